#!/bin/bash
# Starts postgres as the user postgres. An empty PGDATA becomes a cluster first:
#
#   POSTGRES_PASSWORD            of the superuser; needed unless POSTGRES_HOST_AUTH_METHOD=trust
#   POSTGRES_USER, POSTGRES_DB   superuser (postgres) and first database (the superuser's name)
#   POSTGRES_INITDB_ARGS         more arguments for initdb
#   POSTGRES_HOST_AUTH_METHOD    how clients in the network log in (scram-sha-256)
#
# Each of these may be given as a file: POSTGRES_PASSWORD_FILE and so on. Then *.sql, *.sql.gz and *.sh in
# /docker-entrypoint-initdb.d run, by name.
set -euo pipefail

die() { echo "docker-entrypoint.sh: $*" >&2; exit 1; }

# setting NAME [DEFAULT]: makes NAME what it or the file NAME_FILE says.
setting() {
	local name=$1 file=${1}_FILE
	if [ -n "${!name:-}" ] && [ -n "${!file:-}" ]; then
		die "set $name or $file, not both"
	fi
	if [ -n "${!file:-}" ]; then
		printf -v "$name" %s "$(<"${!file}")"
	elif [ -z "${!name:-}" ]; then
		printf -v "$name" %s "${2-}"
	fi
	unset "$file"
}

sql() {
	PGHOST='' psql -v ON_ERROR_STOP=1 --no-psqlrc --no-password --username "$POSTGRES_USER" "$@"
}

run_scripts() {
	local f
	for f in /docker-entrypoint-initdb.d/*; do
		case $f in
		*.sh) if [ -x "$f" ]; then "$f"; else . "$f"; fi ;;
		*.sql) sql --dbname "$POSTGRES_DB" -f "$f" ;;
		*.sql.gz) gunzip -c "$f" | sql --dbname "$POSTGRES_DB" ;;
		*) continue ;;
		esac
		echo "docker-entrypoint.sh: ran $f"
	done
}

# initialize fills PGDATA and serves only the local socket while it does.
initialize() {
	setting POSTGRES_PASSWORD
	setting POSTGRES_USER postgres
	setting POSTGRES_DB "$POSTGRES_USER"
	setting POSTGRES_INITDB_ARGS
	local method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
	[ -n "$POSTGRES_PASSWORD" ] || [ "$method" = trust ] ||
		die "PGDATA is empty and POSTGRES_PASSWORD is not set: give the superuser a password, or set POSTGRES_HOST_AUTH_METHOD=trust"

	local pw=''
	[ -z "$POSTGRES_PASSWORD" ] || pw='--pwfile=<(printf "%s\n" "$POSTGRES_PASSWORD")'
	eval "initdb --username=\"\$POSTGRES_USER\" $pw $POSTGRES_INITDB_ARGS"
	printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

	export PGUSER=$POSTGRES_USER PGPASSWORD=$POSTGRES_PASSWORD
	pg_ctl -w -o "-c listen_addresses='' ${*@Q}" start
	if [ "$POSTGRES_DB" != postgres ]; then
		sql --dbname postgres --set db="$POSTGRES_DB" <<<'CREATE DATABASE :"db"'
	fi
	run_scripts
	pg_ctl -w -m fast stop
	unset PGUSER PGPASSWORD
	echo "docker-entrypoint.sh: PostgreSQL is ready for start up"
}

case ${1-} in
-*) set -- postgres "$@" ;;
esac

if [ "${1-}" = postgres ]; then
	if [ "$(id -u)" = 0 ]; then
		mkdir -p "$PGDATA" /var/run/postgresql
		chmod 700 "$PGDATA"
		chmod 3777 /var/run/postgresql
		find "$PGDATA" \! -user postgres -exec chown postgres:postgres {} +
		find /var/run/postgresql \! -user postgres -exec chown postgres:postgres {} +
		exec setpriv --reuid=postgres --regid=postgres --init-groups --inh-caps=-all -- "$0" "$@"
	fi
	[ -s "$PGDATA/PG_VERSION" ] || initialize "${@:2}"
fi
exec "$@"
