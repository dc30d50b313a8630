# Runs as root in the image's file system: the packages are in /mnt/debs, this recipe in /mnt/recipe.
groupadd --system --gid 101 nginx
useradd --system --gid nginx --uid 101 --home-dir /nonexistent --no-create-home --shell /bin/false nginx
apt-get install -qq -y --no-install-recommends /mnt/debs/*.deb
rm -rf /etc/nginx/sites-available /etc/nginx/sites-enabled /var/www
sed -e 's/^user .*/user nginx;/' -e '/sites-enabled/d' -e 's|^\(\s*\)access_log .*|\1access_log /var/log/nginx/access.log;|' \
	-i /etc/nginx/nginx.conf
ln -sf /dev/stdout /var/log/nginx/access.log
ln -sf /dev/stderr /var/log/nginx/error.log
mkdir /docker-entrypoint.d
