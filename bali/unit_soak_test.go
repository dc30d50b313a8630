//go:build vm && soak

package main

import "testing"

// TestVMSoakUnit has the systemd of a machine run units of bali unit's. What
// happens inside is testdata/vm/unit.sh.
func TestVMSoakUnit(t *testing.T) {
	p := newPlace(t)
	base := p.debian()
	p.sh(`cat >app/web.sh <<'END'
#!/bin/sh
echo start >>$STATE_DIRECTORY/starts
echo "$(id -u):$(id -g), starts $(grep -c start $STATE_DIRECTORY/starts), $(cat $CREDENTIALS_DIRECTORY/key), HOME=$HOME USER=$USER"
exec sleep 100000
END
cat >app/box.sh <<'END'
#!/bin/sh
grep -q '^NoNewPrivs:.1$' /proc/self/status && privileges=no || privileges=with
(: >/proc/sys/vm/swappiness) 2>/dev/null && settings=writable || settings=read-only
grep ^CapBnd /proc/self/status | grep -q '[02468ace]....$' && modules=no || modules=yes
echo "$privileges new privileges, kernel settings $settings, modules $modules"
exec sleep 100000
END
chmod 755 app/*.sh
for a in id cat grep sleep; do ln -s busybox app/bin/$a; done
bali build -q job/app.tar.gz --from ./app --env PATH=/bin`)
	p.machine(base, "node", "unit.sh").boot(userNet, "ok: units are what they say")
}
