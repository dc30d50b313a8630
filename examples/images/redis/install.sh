# Runs as root in the image's file system: the packages are in /mnt/debs, this recipe in /mnt/recipe.
groupadd --system --gid 999 redis
useradd --system --gid redis --uid 999 --home-dir /data --no-create-home --shell /usr/sbin/nologin redis
apt-get install -qq -y --no-install-recommends /mnt/debs/*.deb
install -d -o redis -g redis /data
