#!/bin/sh
# Starts redis-server as the user redis, who then owns the data; anything else runs as it is.
set -eu

case ${1-} in
-* | *.conf) set -- redis-server "$@" ;;
esac

if [ "${1-}" = redis-server ]; then
	if [ "$(id -u)" = 0 ]; then
		find . \! -user redis -exec chown redis:redis {} +
		exec setpriv --reuid=redis --regid=redis --init-groups --inh-caps=-all -- "$0" "$@"
	fi
	# A container's address is its own; without a configuration there is no password to protect.
	for arg in "$@"; do
		case $arg in --protected-mode | *.conf) exec "$@" ;; esac
	done
	exec "$@" --protected-mode no
fi
exec "$@"
