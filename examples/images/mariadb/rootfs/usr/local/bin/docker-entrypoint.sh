#!/bin/bash
# Starts mariadbd as the user mysql. An empty /var/lib/mysql gets its databases first:
#
#   MARIADB_ROOT_PASSWORD                 of root; or MARIADB_RANDOM_ROOT_PASSWORD=1, or MARIADB_ALLOW_EMPTY_ROOT_PASSWORD=1
#   MARIADB_ROOT_HOST                     from where root may log in beside the container itself (%)
#   MARIADB_DATABASE                      a database to create
#   MARIADB_USER, MARIADB_PASSWORD        a user to create, with all rights on that database
#
# Each of these may be given as a file: MARIADB_ROOT_PASSWORD_FILE and so on; MYSQL_ in place of MARIADB_ means the same.
# Then *.sql, *.sql.gz and *.sh in /docker-entrypoint-initdb.d run, by name.
set -euo pipefail

data=/var/lib/mysql

log() { echo "docker-entrypoint.sh: $*"; }
die() { echo "docker-entrypoint.sh: $*" >&2; exit 1; }

# setting NAME [DEFAULT]: makes MARIADB_NAME what it, MYSQL_NAME, or the file MARIADB_NAME_FILE says.
setting() {
	local name=MARIADB_$1 old=MYSQL_$1
	local file=${name}_FILE oldfile=${old}_FILE
	local value=${!name:-${!old:-}} from=${!file:-${!oldfile:-}}
	[ -z "$value" ] || [ -z "$from" ] || die "set $name or $file, not both"
	[ -z "$from" ] || value=$(<"$from")
	printf -v "$name" %s "${value:-${2-}}"
	unset "$old" "$file" "$oldfile"
}

# quoted TEXT: as an SQL string.
quoted() {
	local s=${1//\\/\\\\}
	printf "'%s'" "${s//\'/\'\'}"
}

sql() {
	mariadb --protocol=socket --socket="$socket" -uroot --database="${MARIADB_DATABASE:-}" \
		--init-command="SET SESSION sql_log_bin=0" "$@"
}

run_scripts() {
	local f
	for f in /docker-entrypoint-initdb.d/*; do
		case $f in
		*.sh) if [ -x "$f" ]; then "$f"; else . "$f"; fi ;;
		*.sql) sql <"$f" ;;
		*.sql.gz) gunzip -c "$f" | sql ;;
		*) continue ;;
		esac
		log "ran $f"
	done
}

# initialize fills the data directory with a temporary server that no network reaches.
initialize() {
	setting ROOT_PASSWORD
	setting ROOT_HOST %
	setting DATABASE
	setting USER
	setting PASSWORD
	setting RANDOM_ROOT_PASSWORD
	setting ALLOW_EMPTY_ROOT_PASSWORD
	if [ -n "$MARIADB_RANDOM_ROOT_PASSWORD" ]; then
		MARIADB_ROOT_PASSWORD=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
		log "generated root password: $MARIADB_ROOT_PASSWORD"
	fi
	[ -n "$MARIADB_ROOT_PASSWORD" ] || [ -n "$MARIADB_ALLOW_EMPTY_ROOT_PASSWORD" ] ||
		die "the data directory is empty and MARIADB_ROOT_PASSWORD is not set: give root a password, or set MARIADB_RANDOM_ROOT_PASSWORD or MARIADB_ALLOW_EMPTY_ROOT_PASSWORD"
	[ -z "$MARIADB_USER" ] || [ -n "$MARIADB_PASSWORD" ] || die "MARIADB_USER is set: set MARIADB_PASSWORD too"

	log "initializing the database"
	mariadb-install-db --datadir="$data" --auth-root-authentication-method=normal --skip-test-db --cross-bootstrap >/dev/null
	socket=/run/mysqld/init.sock
	"$@" --skip-networking --socket="$socket" --skip-log-bin &
	local pid=$! i=0
	until mariadb --protocol=socket --socket="$socket" -uroot -e 'SELECT 1' >/dev/null 2>&1; do
		kill -0 $pid 2>/dev/null || die "the temporary server ended"
		[ $((i += 1)) -lt 600 ] || die "the temporary server did not answer within 5 minutes"
		sleep 0.5
	done

	local pw
	pw=$(quoted "$MARIADB_ROOT_PASSWORD")
	MARIADB_DATABASE='' sql <<-SQL
		SET @@SESSION.SQL_LOG_BIN = 0;
		DELETE FROM mysql.global_priv WHERE User = '' OR User = 'root' AND Host <> 'localhost';
		FLUSH PRIVILEGES;
		$([ "$MARIADB_ROOT_HOST" = localhost ] || cat <<-HOST
			CREATE USER 'root'@$(quoted "$MARIADB_ROOT_HOST") IDENTIFIED BY $pw;
			GRANT ALL ON *.* TO 'root'@$(quoted "$MARIADB_ROOT_HOST") WITH GRANT OPTION;
		HOST
		)
		$([ -z "$MARIADB_DATABASE" ] || echo "CREATE DATABASE IF NOT EXISTS \`${MARIADB_DATABASE//\`/\`\`}\`;")
		$([ -z "$MARIADB_USER" ] || echo "CREATE USER $(quoted "$MARIADB_USER")@'%' IDENTIFIED BY $(quoted "$MARIADB_PASSWORD");")
		$([ -z "$MARIADB_USER" ] || [ -z "$MARIADB_DATABASE" ] || {
			# In a GRANT the name is a pattern, where _ and % stand for anything.
			local pattern=${MARIADB_DATABASE//_/\\_}
			echo "GRANT ALL ON \`${pattern//%/\\%}\`.* TO $(quoted "$MARIADB_USER")@'%';"
		})
		SET PASSWORD FOR 'root'@'localhost' = PASSWORD($pw);
		FLUSH PRIVILEGES;
	SQL
	export MYSQL_PWD=$MARIADB_ROOT_PASSWORD
	run_scripts
	mariadb-admin --protocol=socket --socket="$socket" -uroot shutdown
	wait $pid || die "the temporary server did not end cleanly"
	unset MYSQL_PWD
	log "MariaDB is ready for start up"
}

case ${1-} in
-*) set -- mariadbd "$@" ;;
esac

if [ "${1-}" = mariadbd ] || [ "${1-}" = mysqld ]; then
	if [ "$(id -u)" = 0 ]; then
		install -d -o mysql -g mysql -m 1777 /run/mysqld
		find "$data" \! -user mysql -exec chown mysql:mysql {} +
		exec setpriv --reuid=mysql --regid=mysql --init-groups --inh-caps=-all -- "$0" "$@"
	fi
	[ -d "$data/mysql" ] || initialize "$@"
fi
exec "$@"
