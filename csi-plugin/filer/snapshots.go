package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/command"
	"github.com/cradlestack/cradlestack/spec"
)

// userFlags are of the commands that Nomad's users have as well as root.
func (c *cli) userFlags(cmd *cobra.Command) {
	c.apiFlags(cmd)
	c.formatFlag(cmd)
}

func (c *cli) apiFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.url, "api", os.Getenv("CRADLE_FILER_API"), "URL of the filer's API ($CRADLE_FILER_API), which takes $NOMAD_TOKEN (default: the socket, which is root's)")
	f.StringVar(&c.namespace, "namespace", cmp.Or(os.Getenv("NOMAD_NAMESPACE"), "default"), "Nomad's namespace of the volume ($NOMAD_NAMESPACE), with --api")
}

// stamp is the time in names of snapshots that nobody has named.
func stamp() string { return time.Now().UTC().Format("20060102T150405.000Z") }

func (c *cli) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshot VOLUME [NAME]", Short: "keep what a volume is now", Args: cobra.RangeArgs(1, 2),
		Long: `Keep what a volume is now. It is seen in the directory .snapshots/NAME of the volume, and among Nomad's snapshots as VOLUME@NAME. Nomad removes it: nomad
volume snapshot delete.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := "at-" + stamp()
			if len(args) > 1 {
				name = args[1]
			}
			s, err := c.volumes().Snapshot(cmd.Context(), args[0], name)
			if err != nil {
				return err
			}
			return c.print(s, func(w io.Writer) { fmt.Fprintln(w, s.Name) })
		},
	}
	c.userFlags(cmd)
	return cmd
}

func (c *cli) snapshotsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshots VOLUME", Short: "list a volume's snapshots", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := c.volumes().Snapshots(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "SNAPSHOT\tTAKEN\tGOES WITH THE VOLUME")
				for _, s := range all {
					goes := "no"
					if s.Automatic {
						goes = "yes"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, s.Created.UTC().Format(time.RFC3339), goes)
				}
			})
		},
	}
	c.userFlags(cmd)
	return cmd
}

// asMade is what is written for the schedule that a volume was made with.
const asMade = "as-made"

func (c *cli) scheduleCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "schedule VOLUME [SCHEDULE]", Short: "tell or change which automatic snapshots of a volume are kept", Args: cobra.RangeArgs(1, 2),
		Long: `Tell, or change, how many of each kind of a volume's automatic snapshots are kept: hourly=24,daily=7,weekly=4,monthly=6, or some of these. Kinds that are left out end,
and those of them that there are go within a minute. With none no more are taken, and those that there are stay. With as-made it is what the volume was made with.`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			var s api.Schedule
			switch {
			case len(args) == 1:
				s, err = c.volumes().Schedule(cmd.Context(), args[0])
			case args[1] == asMade:
				s, err = c.volumes().Reschedule(cmd.Context(), args[0], "")
			default:
				s, err = c.volumes().Reschedule(cmd.Context(), args[0], args[1])
			}
			if err != nil {
				return err
			}
			return c.print(s, func(w io.Writer) { fmt.Fprintln(w, s.Snapshots) })
		},
	}
	c.userFlags(cmd)
	return cmd
}

func (c *cli) rollbackCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rollback VOLUME SNAPSHOT [PATH]", Short: "make a volume, or a path in it, what it was", Args: cobra.RangeArgs(2, 3),
		Long: `Make a volume, or a path in it with all below, what it was when a snapshot was taken. Pods that have it go on: they wait meanwhile, and then see what was.
What is there now is kept in another snapshot before, whose name is printed: rolling back to that undoes it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := api.Rollback{Snapshot: args[1]}
			if len(args) > 2 {
				r.Path = args[2]
			}
			done, err := c.volumes().Rollback(cmd.Context(), args[0], r)
			if err != nil {
				return err
			}
			return c.print(done, func(w io.Writer) {
				fmt.Fprintf(w, "changed\t%d files and directories, %s were written\n", done.Entries, spec.Bytes(done.Bytes))
				fmt.Fprintf(w, "undo\tcradle-filer rollback %s\n", strings.Join(append([]string{args[0], done.Undo}, words(args[2:])...), " ")) // of the same part: others may have changed the rest since
			})
		},
	}
	c.userFlags(cmd)
	return cmd
}

// words are arguments as a shell takes them.
func words(args []string) (all []string) {
	for _, a := range args {
		if a == "" || strings.ContainsFunc(a, func(c rune) bool {
			return !strings.ContainsRune("/._-+=:@%,", c) && !unicode.IsLetter(c) && !unicode.IsDigit(c)
		}) {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		all = append(all, a)
	}
	return all
}

// shownName is a file's name, which its users have chosen: one that a terminal would take for something else is in quotes, as Go writes it.
func shownName(name string) string {
	if plain := command.Plain(name); plain != name || strings.ContainsAny(name, "\t\"") {
		return strconv.Quote(name)
	}
	return name
}

func (c *cli) diffCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "diff VOLUME SNAPSHOT [SNAPSHOT]", Short: "tell what has changed since a snapshot, until another or until now", Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			to := ""
			if len(args) > 2 {
				to = args[2]
			}
			all, err := c.volumes().Diff(cmd.Context(), args[0], args[1], to)
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer) {
				for _, d := range all {
					fmt.Fprintf(w, "%s\t%s\n", d.What, shownName(d.Path))
				}
			})
		},
	}
	c.userFlags(cmd)
	return cmd
}
