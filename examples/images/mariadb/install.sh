# Runs as root in the image's file system: the packages are in /mnt/debs, this recipe in /mnt/recipe.
groupadd --system --gid 999 mysql
useradd --system --gid mysql --uid 999 --home-dir /var/lib/mysql --no-create-home --shell /usr/sbin/nologin mysql
apt-get install -qq -y --no-install-recommends /mnt/debs/*.deb
# The databases of the package's own set-up go: each container makes its own. So does what only other engines need.
rm -rf /var/lib/mysql /var/log/mysql
install -d -o mysql -g mysql -m 1777 /var/lib/mysql
install -d -o mysql -g mysql -m 1777 /run/mysqld
sed -e 's/^bind-address/#&/' -e 's/^log_error/#&/' -i /etc/mysql/mariadb.conf.d/50-server.cnf
mkdir /docker-entrypoint-initdb.d
