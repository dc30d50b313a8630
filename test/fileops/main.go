// Command fileops does random operations on files in two directories and compares everything that comes of them. One directory is on the file
// system that is to be tested, the other on one that is trusted, such as a tmpfs: they have to give the same answers and hold the same files, always.
//
//	fileops check [-seed N] [-ops N] [-for DURATION] [-workers N] [-drop] [-without FEATURE,…] DIR REFERENCE
//	fileops list DIR
//	fileops map FILE [SEED]
//
// check prints what differs, the operations that led there and the seed that repeats them. list prints all that is in a directory, to be compared
// with what another machine, or the same one after a restart, sees there. map says what a shared mapping of a file has, which it writes before if there is a seed.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fileops:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "list":
		list, err := list(args[1])
		if err == nil {
			_, err = io.WriteString(stdout, list)
		}
		return err
	case (len(args) == 2 || len(args) == 3) && args[0] == "map":
		sum, err := mapFile(args[1], strings.Join(args[2:], ""))
		if err == nil {
			_, err = fmt.Fprintln(stdout, sum)
		}
		return err
	case len(args) > 0 && args[0] == "check":
		return check(args[1:], stdout)
	}
	return errors.New("usage: fileops check [flags] DIR REFERENCE, fileops list DIR, fileops map FILE [SEED]")
}

// features are what -without takes, each with what it stands for.
var features = []string{
	"maplinked (mappings of files with several names)", "mapappend (writing through mappings of files that are open for appending)",
	"unlinked (files that are open and lose a name)", "unlinkedlinks (the same, of files that have others)", "nanoseconds (of times)", "linktimes (times of symbolic links)",
	"reasons (why a name can't be had, where it is taken as well: NFS's client asks the server for that last; version 4 says of a link that it is one)", "copyup (files that are open for reading while overlayfs copies them)",
}

func check(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	seed := flags.Uint64("seed", uint64(time.Now().UnixNano()), "of the operations")
	ops := flags.Int("ops", 0, "how many operations each worker does at least")
	duration := flags.Duration("for", 0, "how long each works at least")
	workers := flags.Int("workers", 1, "how many work at the same time, each in a directory of its own")
	drop := flags.Bool("drop", false, "drop this machine's caches before looking at all files")
	without := flags.String("without", "", "what the file system is known not to do right: "+strings.Join(features, ", "))
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return errors.New("check takes two directories")
	}
	missing := map[string]bool{}
	for f := range strings.SplitSeq(*without, ",") {
		if f != "" && !slices.ContainsFunc(features, func(known string) bool { return strings.HasPrefix(known, f+" ") }) {
			return fmt.Errorf("there is no feature %q", f)
		}
		missing[f] = true
	}
	end := time.Now().Add(*duration)
	done, errs := make([]int, *workers), make([]error, *workers)
	var working sync.WaitGroup
	for i := range *workers {
		working.Go(func() {
			name := fmt.Sprintf("worker%d", i)
			w, err := newWorld(filepath.Join(flags.Arg(0), name), filepath.Join(flags.Arg(1), name), *seed+uint64(i), missing, *drop)
			for err == nil && (w.count < *ops || time.Now().Before(end)) {
				err = w.step()
			}
			if err == nil {
				err = w.finish()
			}
			if err != nil {
				err = fmt.Errorf("seed %d: %w", *seed+uint64(i), err)
			}
			errs[i] = err
			if w != nil {
				done[i] = w.count
			}
		})
	}
	working.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	sum := 0
	for _, n := range done {
		sum += n
	}
	_, err := fmt.Fprintf(stdout, "%d operations, seed %d\n", sum, *seed)
	return err
}
