# unit.sh, TestVMSoakUnit's: what a unit of `bali unit` says, done by systemd. The image's web.sh and box.sh say how they find it.
. ./lib.sh
install -m 755 bali /usr/local/bin/bali
bali trust add "$(cat identity)"
echo secret >/etc/secret
logged() { journalctl --no-pager -o cat -u "$1" | grep -xF "$2"; }
# install_unit NAME FLAGS…: a service of the image
install_unit() {
  name=$1; shift
  bali unit app.tar.gz --name "$name" "$@" >"/etc/systemd/system/$name.service"
  systemctl daemon-reload
}

# a user has its folder and its credential, at the second start too
install_unit web --user 7:8 --state web --credential key:/etc/secret -- /web.sh
systemctl start web
wait_for 120 "the user's folder and credential" logged web '7:8, starts 1, secret, HOME= USER='
systemctl restart web
wait_for 120 "they are the user's again" logged web '7:8, starts 2, secret, HOME= USER='

# root in the sandbox
install_unit box -- /box.sh
systemctl start box
wait_for 120 "the sandbox" logged box 'no new privileges, kernel settings read-only, modules no'

# with a cache that is not there yet, started twice
install_unit cached --cache /var/cache/bali -- /box.sh
systemctl start cached
wait_for 120 "a start that makes its cache" logged cached 'no new privileges, kernel settings read-only, modules no'
[ "$(stat -c '%U %a' /var/cache/bali)" = "root 700" ] || fail "the cache is $(stat -c '%U %a' /var/cache/bali)"
systemctl restart cached
[ "$(systemctl is-active cached)" = active ] || fail "from its cache it is $(systemctl is-active cached)"

# stopped while bali still waits for its image: no failure
mkfifo image
exec 9<>image # it opens, and nothing comes
sed "s,$PWD/app.tar.gz,$PWD/image," /etc/systemd/system/box.service >/etc/systemd/system/waiting.service
systemctl daemon-reload
systemctl start waiting
systemctl stop waiting
got=$(systemctl show -p Result,ActiveState waiting | sort | tr '\n' ' ')
[ "$got" = "ActiveState=inactive Result=success " ] || fail "after the stop: $got"
ok "units are what they say"
