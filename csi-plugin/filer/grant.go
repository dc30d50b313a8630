package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
)

// grantVariables is where the Variables of namespaces' grants are, unless they are asked for elsewhere.
const grantVariables = "cradle-filer/"

func (c *cli) grantCommand() *cobra.Command {
	var g api.Grant
	var user, variable string
	cmd := &cobra.Command{
		Use: "grant VOLUME", Short: "let somebody use a volume over WebDAV and S3, and say how", Args: cobra.ExactArgs(1),
		Long: `Let whoever knows a secret use a volume over WebDAV and S3. The secret is made here and printed; a grant of the same name has the same one until it is revoked.
Grants outlast reboots. With --api it is a grant of a namespace: who may change the volume there can make it, under a name that is the namespace's own, and its secret is
in a Variable of that namespace, for jobs to read.`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			g.Volume = args[0]
			if g.ID == "" {
				g.ID = strings.ToLower(rand.Text()[:16])
			}
			if g.UID, g.GID, err = parseUser(user); err != nil {
				return err
			}
			switch {
			case c.url != "":
				g.Tenant = &api.Tenant{Variable: variable}
			case variable != "":
				return errors.New("--variable: it is for --api, by which a grant is a namespace's")
			}
			if g, err = c.volumes().Grant(cmd.Context(), g); err != nil {
				return err
			}
			return c.print(g, func(w io.Writer) {
				if g.Tenant != nil {
					fmt.Fprintf(w, "grant\t%s of namespace %s\nvariable\t%s\n", g.Tenant.Name, g.Tenant.Namespace, g.Tenant.Variable)
				}
				fmt.Fprintf(w, "user\t%s\nsecret\t%s\n", g.ID, g.Secret)
				if g.WebDAV != "" {
					fmt.Fprintf(w, "webdav\t%s\n", g.WebDAV)
				}
				if g.S3 != "" {
					fmt.Fprintf(w, "s3\t%s, bucket %s; the access key is the user\n", g.S3, g.Volume)
				}
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&g.ID, "id", "", "name of the grant, with which its user logs in, unless it is a namespace's (default a new one)")
	f.BoolVar(&g.ReadOnly, "read-only", false, "nothing can be changed by it")
	f.StringVar(&user, "user", "0:0", "UID[:GID] of whom belongs what is made: that of the containers which use the volume")
	f.StringVar(&variable, "variable", "", "with --api, path of the Variable that is written (default "+grantVariables+"NAME); jobs read nomad/jobs/JOB without a policy")
	c.userFlags(cmd)
	return cmd
}

// parseUser reads UID or UID:GID; a group that is not said has the user's number.
func parseUser(text string) (uid, gid int, err error) {
	user, group, said := strings.Cut(text, ":")
	if !said {
		group = user
	}
	u, uerr := strconv.ParseUint(user, 10, 32)
	g, gerr := strconv.ParseUint(group, 10, 32)
	if uerr != nil || gerr != nil || u == math.MaxUint32 || g == math.MaxUint32 {
		return 0, 0, fmt.Errorf("--user %s: it is not UID:GID, two numbers; the names are the containers' own", text)
	}
	return int(u), int(g), nil
}

func (c *cli) revokeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "revoke GRANT…", Short: "end grants: nobody gets in by them any more", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var errs []error
			for _, id := range args {
				errs = append(errs, c.volumes().Revoke(cmd.Context(), id))
			}
			return errors.Join(errs...)
		},
	}
	c.apiFlags(cmd)
	return cmd
}

func (c *cli) grantsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "grants", Short: "list who may use what over WebDAV and S3", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.volumes().Grants(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "GRANT\tVOLUME\tACCESS\tUSER\tNAMESPACE\tVARIABLE")
				for _, g := range all {
					id, of, t := g.ID, g.Volume, api.Tenant{Namespace: "-", Variable: "-"}
					if g.Tenant != nil {
						t = *g.Tenant
						if c.url != "" { // as who asks calls them
							id, of = t.Name, t.Volume
						}
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%d:%d\t%s\t%s\n", id, of, access(g.ReadOnly), g.UID, g.GID, t.Namespace, t.Variable)
				}
			})
		},
	}
	c.userFlags(cmd)
	return cmd
}
