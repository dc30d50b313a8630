# Runs as root in the image's file system: the packages are in /mnt/debs, this recipe in /mnt/recipe.
groupadd --system --gid 999 postgres
useradd --system --gid postgres --uid 999 --home-dir /var/lib/postgresql --shell /bin/bash postgres
mkdir -p /etc/postgresql-common
echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
apt-get install -qq -y --no-install-recommends /mnt/debs/*.deb
version=$(ls /usr/lib/postgresql)
ln -s "$version/bin" /usr/lib/postgresql/bin
sample=/usr/share/postgresql/$version/postgresql.conf.sample
sed -i "s/^#\?listen_addresses = .*/listen_addresses = '*'/" "$sample"
install -d -o postgres -g postgres -m 1777 /var/lib/postgresql/data
install -d -o postgres -g postgres -m 3777 /var/run/postgresql
mkdir /docker-entrypoint-initdb.d
# Compiling queries at run time takes LLVM, four fifths of the packages' size; without its provider postgres just doesn't.
rm -rf /usr/lib/postgresql/*/lib/bitcode /usr/lib/postgresql/*/lib/llvmjit* /usr/lib/*/libLLVM-*.so* /usr/lib/llvm-* /usr/lib/*/libz3.so*
# A private key that everyone has is none.
rm -f /etc/ssl/private/ssl-cert-snakeoil.key /etc/ssl/certs/ssl-cert-snakeoil.pem
