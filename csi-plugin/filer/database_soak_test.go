//go:build vm && soak

package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// A database that a pod has on a volume. $sql of env reads statements from its input.
type database struct {
	image, data string
	process     string // its name
	env         string // sets up what start and check need
	start       string // in the foreground
	check       string // ends it, and says "well" if its pages are what they were
}

var databases = []database{
	{
		image: "mariadb", data: "/var/lib/mysql", process: "mariadbd",
		env:   `export MARIADB_ROOT_PASSWORD=secret MARIADB_DATABASE=shop; sql="mariadb -h 127.0.0.1 -psecret -N -B --unbuffered shop"`,
		start: "docker-entrypoint.sh mariadbd",
		check: `echo "CHECK TABLE goods EXTENDED;" | $sql | grep -q 'status.*OK' && echo well; ended`,
	},
	{
		image: "postgres", data: "/v", process: "postgres",
		env: `export POSTGRES_PASSWORD=secret PGPASSWORD=secret POSTGRES_DB=shop POSTGRES_INITDB_ARGS=--data-checksums PGDATA=/v/data # the image has a volume of its own where it is otherwise
		sql="psql -h 127.0.0.1 -U postgres -q -t -A shop"`,
		start: "docker-entrypoint.sh postgres",
		check: `kill -INT $server; wait $server; pg_checksums --check >/dev/null && echo well`,
	},
}

// databaseScript starts it, says how many rows there are, adds some, each committed before it says so, and kills it while it does; as often as it is told.
const databaseScript = `%[1]s
ended() { while :; do found=; for p in /proc/[0-9]*; do read -r name <$p/comm && [ "$name" = %[2]s ] && found=1 && kill -9 ${p#/proc/}; done 2>/dev/null; [ "$found" ] || return 0; sleep 0.1; done; }
for round in $(seq %[4]d); do
	%[3]s >>/log 2>&1 & server=$!
	until echo "CREATE TABLE IF NOT EXISTS goods (id INT PRIMARY KEY, t VARCHAR(2000));" | $sql >/dev/null 2>&1; do
		kill -0 $server 2>/dev/null || { wait $server; echo "it has ended: $?"; tail -n 30 /log; exit 1; }; sleep 0.3
	done
	set -- $(echo "SELECT CONCAT(COUNT(*), ' ', COALESCE(MAX(id), 0), ' ', COALESCE(SUM(LENGTH(t)), 0)) FROM goods;" | $sql); echo "found $1 up to $2 of $3 bytes"
	[ $round = %[4]d ] && break
	: >/said
	(i=$2; while :; do i=$((i+1)); echo "INSERT INTO goods VALUES ($i, REPEAT('x', 2000)); SELECT CONCAT('committed ', $i);"; sleep 0.05; done) 2>/dev/null | $sql 2>/dev/null >/said & adds=$!
	until [ $(wc -l </said) -ge 20 ] || ! kill -0 $adds 2>/dev/null; do sleep 0.2; done
	ended; wait $server 2>/dev/null; wait $adds 2>/dev/null; grep -x 'committed [0-9]*' /said
done
%[5]s`

// TestVMSoakDatabases: databases on a volume that the guest's kernel has mounted, by each engine, are killed while they commit rows, and started again, in the end in
// another pod. All that they have said to be committed is there, and their pages are what they wrote.
func TestVMSoakDatabases(t *testing.T) {
	const rounds = 6
	for _, engine := range []string{embedded, byGanesha} {
		for _, d := range databases {
			t.Run(engine+"/"+d.image, func(t *testing.T) {
				f := filertest.Start(t, "--engine", engine)
				f.Volume("v", 1<<30, nil)
				p := f.Publish("v")
				last, starts := 0, 0
				for _, rounds := range []int{rounds, 1} {
					pod := startImage(t, d.image, fmt.Sprintf(databaseScript, d.env, d.process, d.start, rounds, d.check), "-m", "768m", "--mount", p.Mount(d.data))
					if err := pod.cmd.Wait(); err != nil {
						t.Fatalf("the pod: %v\n%s\n%s", err, &pod.out, f.Log())
					}
					for line := range strings.Lines(pod.out.String()) {
						var n, most, bytes int
						if _, err := fmt.Sscanf(line, "found %d up to %d of %d bytes\n", &n, &most, &bytes); err == nil {
							if n != most || n < last || bytes != 2000*n {
								t.Fatalf("row %d was committed, and at the next start there are %d, up to %d, of %d bytes\n%s", last, n, most, bytes, &pod.out)
							}
							last, starts = n, starts+1
						} else if _, err := fmt.Sscanf(line, "committed %d\n", &n); err == nil {
							if n != last+1 {
								t.Fatalf("row %d follows row %d\n%s", n, last, &pod.out)
							}
							last = n
						}
					}
					if !strings.HasSuffix(pod.out.String(), "\nwell\n") {
						t.Errorf("the pod says\n%s", &pod.out)
					}
				}
				t.Logf("%d rows were committed, none lost, at %d starts", last, starts)
				if starts != rounds+1 || last < 20*(rounds-1) {
					t.Errorf("there were %d starts and %d rows", starts, last)
				}
			})
		}
	}
}
