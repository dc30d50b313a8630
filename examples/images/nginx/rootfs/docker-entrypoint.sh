#!/bin/sh
# Runs what users put into /docker-entrypoint.d, then the command.
set -eu

if [ "${1-}" = nginx ]; then
	for f in /docker-entrypoint.d/*; do
		case $f in
		*.envsh) [ ! -x "$f" ] || . "$f" ;;
		*.sh) [ ! -x "$f" ] || "$f" ;;
		esac
	done
fi
exec "$@"
