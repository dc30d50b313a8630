package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// coldFlags say where cold storage is.
type coldFlags struct {
	where, key       string
	endpoint, region string
}

func (o *coldFlags) add(f *pflag.FlagSet) {
	f.StringVar(&o.where, "cold", "", "cold storage for copies of volumes: a directory, or s3://BUCKET/PREFIX, which $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY open")
	f.StringVar(&o.key, "cold-key", "/etc/cradle/cold.key", "key of all copies: age-keygen makes it. Keep another copy of it")
	f.StringVar(&o.endpoint, "cold-endpoint", "", "address of the bucket's server: https://s3.example.org (default: Amazon's)")
	f.StringVar(&o.region, "cold-region", "us-east-1", "the bucket's region")
}

// open returns the vault, nil where there is to be none.
func (o *coldFlags) open() (*cold.Vault, error) {
	if o.where == "" {
		return nil, nil
	}
	key, err := cold.ReadKey(o.key)
	if err != nil {
		return nil, fmt.Errorf("--cold-key: %w", err)
	}
	if !strings.HasPrefix(o.where, "s3://") {
		if o.addressed() {
			return nil, fmt.Errorf("--cold %s: write s3://BUCKET/PREFIX with the server's address as --cold-endpoint, or a directory", o.where)
		}
		folder, err := cold.OpenFolder(o.where)
		if err != nil {
			return nil, fmt.Errorf("--cold: %w", err)
		}
		return cold.NewVault(folder, key), nil
	}
	u, err := url.Parse(o.where)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("--cold %s: write s3://BUCKET or s3://BUCKET/PREFIX", o.where)
	}
	prefix := strings.Trim(u.Path, "/")
	if prefix != "" {
		prefix += "/"
	}
	bucket, err := cold.OpenBucket(cold.S3{
		Endpoint: o.endpoint, Region: o.region, Bucket: u.Host, Prefix: prefix,
		AccessKey: os.Getenv("AWS_ACCESS_KEY_ID"), SecretKey: os.Getenv("AWS_SECRET_ACCESS_KEY"),
	})
	if err != nil {
		return nil, fmt.Errorf("--cold: %w", err)
	}
	return cold.NewVault(bucket, key), nil
}

// addressed says whether it is no directory, be it written well or not.
func (o *coldFlags) addressed() bool {
	return strings.Contains(o.where, "://") || strings.HasPrefix(o.where, "s3:")
}

// vault is open for the commands, which need one that is there: in what is mounted nowhere they would find no copies.
func (o *coldFlags) vault() (*cold.Vault, error) {
	if o.where != "" && !o.addressed() {
		_, err := os.Stat(o.where)
		if err == nil && !cold.Begun(o.where) {
			err = fmt.Errorf("%s: nothing was ever copied to it", o.where)
		}
		if err != nil {
			return nil, fmt.Errorf("--cold: %w; write the directory that the plugin has, and mount it where it is another host's", err)
		}
	}
	v, err := o.open()
	if err == nil && v == nil {
		err = errors.New("--cold: it is missing; write the directory or s3://BUCKET that the plugin has")
	}
	return v, err
}

func (c *cli) coldCommand() *cobra.Command {
	var o coldFlags
	cmd := &cobra.Command{Use: "cold", Short: "list, verify and restore copies in cold storage"}
	o.add(cmd.PersistentFlags())
	cmd.AddCommand(
		&cobra.Command{
			Use: "ls [VOLUME]", Short: "list the copies, the newest last", Args: cobra.MaximumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error { return c.coldList(cmd.Context(), &o, args) },
		},
		&cobra.Command{
			Use: "verify [VOLUME | VOLUME@TIME]...", Short: "read whole copies, all where none is named, and tell every chunk that is damaged",
			RunE: func(cmd *cobra.Command, args []string) error { return c.coldVerify(cmd.Context(), &o, args) },
		},
		c.coldRestoreCommand(&o),
	)
	return cmd
}

func (c *cli) coldList(ctx context.Context, o *coldFlags, args []string) error {
	v, err := o.vault()
	if err != nil {
		return err
	}
	all, err := v.Copies(ctx, strings.Join(args, ""))
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "COPY\tAGE\tOF THE VOLUME MADE")
	for _, one := range all {
		fmt.Fprintf(w, "%s\t%v\t%s\n", one, time.Since(one.Taken).Round(time.Second), one.Born.Format(time.RFC3339))
	}
	return w.Flush()
}

func (c *cli) coldVerify(ctx context.Context, o *coldFlags, args []string) error {
	v, err := o.vault()
	if err != nil {
		return err
	}
	var all []cold.Copy
	for _, name := range args {
		one, err := v.Find(ctx, name)
		if err != nil {
			return err
		}
		all = append(all, one)
	}
	if len(args) == 0 {
		if all, err = v.Copies(ctx, ""); err != nil {
			return err
		}
	}
	var seen sync.Map
	var errs []error
	for _, one := range all {
		info, err := v.Verify(ctx, one, &seen, func(err error) { fmt.Fprintln(c.stdout, err) })
		switch {
		case err == nil:
			fmt.Fprintf(c.stdout, "%s: whole, %v of a volume of %v\n", one, spec.Bytes(info.Stored), spec.Bytes(info.Size))
		case errors.Is(err, cold.ErrDamaged):
			errs = append(errs, err)
		case errors.Is(err, volume.ErrNotFound) && len(args) == 0:
			fmt.Fprintf(c.stdout, "%s: removed meanwhile, as newer ones have its place\n", one)
		default:
			return err
		}
	}
	return errors.Join(errs...)
}

func (c *cli) coldRestoreCommand(o *coldFlags) *cobra.Command {
	var as, pool string
	cmd := &cobra.Command{
		Use: "restore VOLUME | VOLUME@TIME", Short: "make a volume of a copy, on this host", Args: cobra.ExactArgs(1),
		Long: `Make a volume of a copy, the newest one where no time is named. The volume is there only once it is whole; interrupted, the same command goes on where
it was. A copy of which something is damaged makes no volume: the chunk is named, and another copy can be taken.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.coldRestore(cmd.Context(), o, args[0], as, pool)
		},
	}
	f := cmd.Flags()
	c.backendFlags(f)
	f.StringVar(&as, "as", "", "name of the volume that is made (default: the copied one's)")
	f.StringVar(&pool, "into", "", "name of the pool that it is made in (default: the first)")
	return cmd
}

func (c *cli) coldRestore(ctx context.Context, o *coldFlags, name, as, pool string) error {
	v, err := o.vault()
	if err != nil {
		return err
	}
	one, err := v.Find(ctx, name)
	if err != nil {
		return err
	}
	b, _, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := known(ctx, v, b); err != nil {
		return err
	}
	return c.receive(ctx, b, v, one, volume.Request{Name: cmp.Or(as, one.Volume), Parameters: volume.Parameters{Pool: pool}})
}

// damaged says how to have another copy, where one is. One that is only not read with this key is not to be removed for that.
func damaged(one cold.Copy, err error) error {
	if errors.Is(err, cold.ErrKey) {
		return fmt.Errorf("%w; give this host the key that the copies are made with. Should it have that, somebody else has made this one: then remove %s from cold storage to have the one before it be the newest", err, one.Object())
	}
	if errors.Is(err, cold.ErrDamaged) {
		err = fmt.Errorf("%w; \"cradle-csi cold ls %s\" lists others. Remove %s from cold storage to have the one before it be the newest", err, one.Volume, one.Object())
	}
	return err
}

// known refuses a vault that is not the one which the backend's volumes are copied to, where that is known.
func known(ctx context.Context, v *cold.Vault, b volume.Backend) error {
	n, ok := b.(volume.Noter)
	if !ok {
		return nil
	}
	return v.Known(ctx, n)
}

// receive makes a volume of a copy. Name, pool and generation are the request's.
func (c *cli) receive(ctx context.Context, b volume.Backend, v *cold.Vault, one cold.Copy, r volume.Request) error {
	receiver, ok := b.(volume.Receiver)
	if !ok {
		return fmt.Errorf("--backend %s: it takes no copies", c.backend)
	}
	info, err := v.Info(ctx, one)
	if err != nil {
		return damaged(one, err)
	}
	pool := r.Pool
	if r.Parameters, err = volume.ParseParameters(info.Parameters); err != nil {
		return fmt.Errorf("copy %s: %w", one, err)
	}
	suit(c.backend, &r)
	// Its own copies are the newer ones, also where this host's clock is behind.
	if r.After, err = v.Born(ctx, r.Name); err != nil {
		return err
	}
	r.Pool, r.Size, r.Origin.Copy = pool, info.Size, one.String()
	made, err := receiver.Receive(ctx, r, info.Content, func(ctx context.Context, disk *os.File) error { return v.Restore(ctx, one, disk) })
	err = damaged(one, err)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "volume %s: %v, restored from %s\n", made.ID, spec.Bytes(made.Size), one)
	return nil
}
