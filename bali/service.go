package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/bali/fetch"
	"github.com/cradlestack/cradlestack/bali/launch"
	"github.com/cradlestack/cradlestack/bali/seal"
)

func (c *cli) service() []*cobra.Command {
	return []*cobra.Command{c.unit(), c.install(), c.upgrade(), c.rollback(), c.recover()}
}

// unitOptions say what a service's unit looks like; bali install keeps them as
// JSON for the next upgrade.
type unitOptions struct {
	Name        string   `json:"name"`
	Bali        string   `json:"bali"`
	Type        string   `json:"type,omitempty"` // notify, exec, oneshot
	Host        bool     `json:"host,omitempty"`
	Identities  []string `json:"identities,omitempty"`
	Env         []string `json:"env,omitempty"`
	Volumes     []string `json:"volumes,omitempty"`
	Credentials []string `json:"credentials,omitempty"` // NAME:PATH
	State       []string `json:"state,omitempty"`       // below /var/lib
	After       []string `json:"after,omitempty"`
	Cache       string   `json:"cache,omitempty"`
	User        string   `json:"user,omitempty"`
	MemoryMax   string   `json:"memoryMax,omitempty"`
	Size        string   `json:"size,omitempty"`
	Setid       bool     `json:"setid,omitempty"`
	Devices     bool     `json:"devices,omitempty"`
	Command     []string `json:"command,omitempty"`
	// Reading are flags, as --NAME=VALUE, that say how the image is fetched and
	// whose signature counts: the service needs them as much as who makes it.
	Reading []string `json:"reading,omitempty"`
}

func (o *unitOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "`NAME` of the service")
	f.StringVar(&o.Bali, "bali", "", "`PATH` of bali on the host (default this program's)")
	f.StringVar(&o.Type, "type", "", "notify (the service tells when it is ready), exec or oneshot (default the image's label bali.type, or exec)")
	f.BoolVar(&o.Host, "host", false, "for a service that manages the host: no sandbox, its mounts reach the host, its children outlive it")
	f.StringArrayVarP(&o.Identities, "identity", "i", nil, "accept this identity and no other")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "`NAME=VALUE` for bali run -e")
	f.StringArrayVarP(&o.Volumes, "volume", "v", nil, "`HOST:PATH[:ro]` for bali run -v")
	f.StringArrayVar(&o.Credentials, "credential", nil, "`NAME:FILE` to pass as a systemd credential; with FILE encrypted, NAME:encrypted:FILE")
	f.StringArrayVar(&o.State, "state", nil, "`DIR` below /var/lib that systemd makes for the service")
	f.StringArrayVar(&o.After, "after", nil, "`UNIT` to start after, and to want")
	f.StringVar(&o.Cache, "cache", "", "`DIR` for bali run --cache")
	f.StringVar(&o.User, "user", "", "`NAME[:GROUP]` for bali run --user")
	f.StringVar(&o.MemoryMax, "memory-max", "", "`SIZE` of memory, the unpacked image included")
	f.StringVar(&o.Size, "size", "", "`SIZE` for bali run --size")
	f.BoolVar(&o.Setid, "setid", false, "for bali run --setid")
	f.BoolVar(&o.Devices, "devices", false, "for bali run --devices")
}

// flags whose values the service's own bali run needs; the second are of no use
// for a file.
var (
	readingFlags  = []string{"max-size", "max-entries"}
	fetchingFlags = []string{"retries", "idle", "ssh-key", "known-hosts"}
)

// keep notes how the image was read.
func (o *unitOptions) keep(c *cli, cmd *cobra.Command) error {
	o.Reading = nil
	add := func(name, value string) error {
		if name == "ssh-key" || name == "known-hosts" || name == "trust" {
			var err error
			if value, err = filepath.Abs(value); err != nil {
				return err
			}
		}
		o.Reading = append(o.Reading, "--"+name+"="+value)
		return nil
	}
	for _, name := range slices.Concat(readingFlags, fetchingFlags) {
		if f := cmd.Flags().Lookup(name); f.Changed {
			if err := add(name, f.Value.String()); err != nil {
				return err
			}
		}
	}
	if c.trustFile != "" && len(o.Identities) == 0 {
		return add("trust", c.trustFile)
	}
	return nil
}

// again sets the flags that keep noted, but for those that were given anew.
func (o *unitOptions) again(cmd *cobra.Command) error {
	for _, r := range o.Reading {
		name, value, _ := strings.Cut(strings.TrimPrefix(r, "--"), "=")
		if f := cmd.Flags().Lookup(name); f != nil && !f.Changed {
			if err := cmd.Flags().Set(name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *cli) unit() *cobra.Command {
	var o unitOptions
	var r reading
	cmd := &cobra.Command{
		Use:   "unit FILE|URL --name NAME [-- CMD…]",
		Short: "print a systemd unit that runs an image",
		Long: `Print a systemd unit that runs an image. The image is read to learn how it
stops and whether it tells systemd that it is ready; it must be trusted.`,
		Args: fileAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Command = args[1:]
			if err := o.keep(c, cmd); err != nil {
				return err
			}
			p, err := c.policy(o.Identities, false)
			if err != nil {
				return err
			}
			src, err := c.open(cmd.Context(), args[0], &r)
			if err != nil {
				return named(args[0], err)
			}
			defer src.Close()
			image, _, err := describeImage(src, r.limits(), p)
			if err != nil {
				return named(args[0], err)
			}
			where, err := absolute(args[0])
			if err != nil {
				return err
			}
			text, err := o.render(image, where)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(c.stdout, text)
			return err
		},
	}
	o.flags(cmd)
	r.flags(cmd)
	return cmd
}

func fileAndCommand(cmd *cobra.Command, args []string) error {
	switch n := cmd.ArgsLenAtDash(); {
	case len(args) == 0 || n == 0:
		return errors.New("name an image: FILE|URL")
	case n < 0 && len(args) > 1 || n > 1:
		return fmt.Errorf("unexpected %q: the command comes after --", args[1])
	}
	return nil
}

// absolute makes paths independent of where they are used.
func absolute(where string) (string, error) {
	if fetch.IsURL(where) {
		return where, nil
	}
	return filepath.Abs(where)
}

// describeImage reads a whole image for its description, and verifies it.
func describeImage(src *source, l seal.Limits, p *policy) (*seal.Image, *seal.Signature, error) {
	r, err := seal.NewReader(src, l)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	for err == nil {
		_, err = r.Next()
	}
	if !isEOF(err) {
		return nil, nil, err
	}
	s, err := r.Finish()
	if err := p.accept(s, err); err != nil {
		return nil, nil, err
	}
	return r.Image(), s, nil
}

// rightPlatform refuses an image for another machine.
func rightPlatform(i *seal.Image) error {
	if i.OS != "linux" || i.Architecture != runtime.GOARCH {
		return fmt.Errorf("it is for %q and this machine is linux/%s", i.OS+"/"+i.Architecture, runtime.GOARCH)
	}
	return nil
}

// What systemd would pass over, with a word in the journal, is refused here.
var (
	unitName   = regexp.MustCompile(`^[A-Za-z0-9:_.][A-Za-z0-9:_.-]*$`)
	wholeName  = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.(service|socket|target|mount|automount|path|timer|device|slice|swap)$`)
	memorySize = regexp.MustCompile(`^([0-9]+(\.[0-9]+)?[KMGT]?|[0-9]+%|infinity)$`)
)

// isName: a service's, and that of its folder.
func isName(s string) bool {
	return unitName.MatchString(s) && s[0] != '.' && len(s) <= 200
}

func (o *unitOptions) check() error {
	switch {
	case !isName(o.Name):
		return fmt.Errorf("--name %q: want letters, digits and :_.-, at most 200", o.Name)
	case o.Bali != "" && !path.IsAbs(o.Bali):
		return fmt.Errorf("--bali %s: want an absolute path", o.Bali)
	case o.MemoryMax != "" && !memorySize.MatchString(o.MemoryMax):
		return fmt.Errorf("--memory-max %q: want a size like 512M or 8G", o.MemoryMax)
	case !slices.Contains([]string{"", "notify", "exec", "oneshot"}, o.Type):
		return fmt.Errorf("--type %s: there are notify, exec and oneshot", o.Type)
	}
	if err := checkEnv(o.Env); err != nil {
		return err
	}
	for _, v := range o.Volumes {
		if _, err := launch.ParseVolume(v); err != nil {
			return err
		}
	}
	for _, s := range o.After {
		if !wholeName.MatchString(s) {
			return fmt.Errorf("--after %q: want the whole name of one unit, like consul.service; repeat it for more", s)
		}
	}
	for _, s := range o.State {
		if strings.ContainsAny(s, " \t") || path.IsAbs(s) || path.Clean(s) != s || s == "." || strings.HasPrefix(s, "..") {
			return fmt.Errorf("--state %s: want a name below /var/lib", s)
		}
	}
	for _, cr := range o.Credentials {
		name, file, ok := strings.Cut(cr, ":")
		file = strings.TrimPrefix(file, "encrypted:")
		if !ok || !isName(name) || !path.IsAbs(file) {
			return fmt.Errorf("--credential %s: want NAME:/absolute/file", cr)
		}
	}
	return nil
}

// checkEnv refuses variables without a name.
func checkEnv(env []string) error {
	for _, e := range env {
		if e == "" || e[0] == '=' {
			return fmt.Errorf("--env %q: want NAME[=VALUE]", e)
		}
	}
	return nil
}

// render is the unit for an image that lies at where, with commands that run
// before it.
func (o *unitOptions) render(image *seal.Image, where string, before ...string) (string, error) {
	if err := o.check(); err != nil {
		return "", err
	}
	var b strings.Builder
	var broken error
	section := func(name string) { fmt.Fprintf(&b, "\n[%s]\n", name) }
	set := func(key string, value ...string) {
		for _, v := range value {
			switch {
			case strings.ContainsAny(v, "\n\r\x00") || strings.HasSuffix(v, `\`):
				broken = fmt.Errorf("%s=%q doesn't fit into a unit: it has a line break, or a backslash at its end", key, v)
			case !utf8.ValidString(v):
				broken = fmt.Errorf("%s=%q doesn't fit into a unit: it is not UTF-8", key, v)
			}
			fmt.Fprintf(&b, "%s=%s\n", key, v)
		}
	}
	b.WriteString("# made by bali unit; bali install and bali upgrade write it anew\n[Unit]\n")
	set("Description", specifiers(o.Name)+", run by bali from a signed image")
	set("Wants", strings.Join(append([]string{"network-online.target"}, o.After...), " "))
	set("After", strings.Join(append([]string{"network-online.target"}, o.After...), " "))
	set("StartLimitIntervalSec", "300")
	set("StartLimitBurst", "20")

	section("Service")
	kind := o.kind(image)
	set("Type", kind)
	if kind == "notify" {
		set("NotifyAccess", "main")
	}
	command, err := o.command(where)
	if err != nil {
		return "", err
	}
	uid, gid, err := o.owner(image)
	if err != nil {
		return "", err
	}
	if uid != "" {
		set("User", uid)
		if gid != "" {
			set("Group", gid)
		}
		set("UnsetEnvironment", "USER LOGNAME HOME SHELL") // those of the host's user with that number
		command = "!" + command                            // as root, who becomes the user by himself
	}
	set("ExecStartPre", before...)
	if o.Cache != "" && !o.Host {
		// In the sandbox bali could not make it, and what is not there yet can't be writable in it.
		set("ExecStartPre", "+"+commandLine([]string{"mkdir", "-p", "-m", "700", "--", o.Cache}))
	}
	set("ExecStart", command)
	set("SyslogIdentifier", o.Name) // the journal would say bali
	if kind == "oneshot" {
		set("RemainAfterExit", "yes")
	} else {
		set("Restart", "always")
		set("RestartSec", "2")
	}
	set("TimeoutStartSec", "300") // fetching the image is part of it
	if image.StopSignal != "" {
		if !signalName.MatchString(image.StopSignal) {
			return "", fmt.Errorf("the image's stop signal %q is none", image.StopSignal)
		}
		set("KillSignal", stopSignal(image.StopSignal))
	}
	set("TimeoutStopSec", "60")
	set("LimitNOFILE", "65536")
	set("TasksMax", "infinity")
	if o.MemoryMax != "" {
		set("MemoryMax", o.MemoryMax)
	}
	if len(o.State) > 0 {
		set("StateDirectory", strings.Join(o.State, " "))
		set("StateDirectoryMode", "0700")
	}
	for _, cr := range o.Credentials {
		name, file, _ := strings.Cut(cr, ":")
		if encrypted, ok := strings.CutPrefix(file, "encrypted:"); ok {
			set("LoadCredentialEncrypted", specifiers(name+":"+encrypted))
		} else {
			set("LoadCredential", specifiers(cr))
		}
	}
	o.sandbox(set)

	section("Install")
	set("WantedBy", "multi-user.target")
	return b.String(), broken
}

func (o *unitOptions) kind(image *seal.Image) string {
	switch label := image.Labels["bali.type"]; {
	case o.Type != "":
		return o.Type
	case label == "notify" || label == "oneshot":
		return label
	}
	return "exec"
}

// owner is whose systemd makes the folders of --state and the credentials, where
// that isn't root. It doesn't know the image's names.
func (o *unitOptions) owner(image *seal.Image) (uid, gid string, err error) {
	user := cmp.Or(o.User, image.User)
	uid, gid, _ = strings.Cut(user, ":")
	if len(o.State)+len(o.Credentials) == 0 || uid == "" || uid == "root" || uid == "0" {
		return "", "", nil
	}
	for _, id := range []string{uid, cmp.Or(gid, "0")} {
		if _, err := strconv.ParseUint(id, 10, 32); err != nil {
			return "", "", fmt.Errorf("the service is %q of its image, whom systemd doesn't know: for --state and --credential say --user UID:GID", user)
		}
	}
	return uid, gid, nil
}

// signalName is a signal as images write it. systemd tells those that exist.
var signalName = regexp.MustCompile(`^([0-9]{1,2}|(SIG)?[A-Z][A-Z0-9]{1,15}([+-][0-9]{1,2})?)$`)

func stopSignal(s string) string {
	if strings.HasPrefix(s, "SIG") || s[0] >= '0' && s[0] <= '9' {
		return s
	}
	return "SIG" + s
}

// sandbox is what systemd takes from a service that bali's mounts don't need.
// The part that gives the unit mounts of its own cuts the propagation of
// volumes to the host, so a host service has none of it.
func (o *unitOptions) sandbox(set func(string, ...string)) {
	set("LockPersonality", "yes")
	set("SystemCallArchitectures", "native")
	if o.Host {
		set("Delegate", "yes")
		set("KillMode", "process")
		set("OOMScoreAdjust", "-900")
		return
	}
	set("KillMode", "mixed")
	set("RestrictRealtime", "yes")
	set("RestrictNamespaces", "mnt")
	for _, k := range []string{"ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "PrivateTmp"} {
		set(k, "yes")
	}
	if !o.Setid {
		set("NoNewPrivileges", "yes")
	}
	set("ProtectSystem", "strict")
	var writable []string
	for _, v := range o.Volumes {
		if p, err := launch.ParseVolume(v); err == nil && !p.ReadOnly {
			writable = append(writable, p.Host)
		}
	}
	if o.Cache != "" {
		writable = append(writable, o.Cache)
	}
	for _, w := range writable {
		set("ReadWritePaths", "-"+quoteUnit(w))
	}
}

// command is bali run's command line.
func (o *unitOptions) command(where string) (string, error) {
	self, err := o.self()
	if err != nil {
		return "", err
	}
	argv := []string{self, "run"}
	add := func(flag string, values ...string) {
		for _, v := range values {
			if v != "" {
				argv = append(argv, flag, v)
			}
		}
	}
	add("-i", o.Identities...)
	add("-e", o.Env...)
	add("-v", o.Volumes...)
	add("--cache", o.Cache)
	add("--user", o.User)
	add("--size", o.Size)
	if o.Setid {
		argv = append(argv, "--setid")
	}
	if o.Devices {
		argv = append(argv, "--devices")
	}
	for _, r := range o.Reading {
		name, _, _ := strings.Cut(strings.TrimPrefix(r, "--"), "=")
		if fetch.IsURL(where) || !slices.Contains(fetchingFlags, name) {
			argv = append(argv, r)
		}
	}
	argv = append(argv, where)
	if len(o.Command) > 0 {
		argv = append(append(argv, "--"), o.Command...)
	}
	return commandLine(argv), nil
}

// self is bali on the host.
func (o *unitOptions) self() (string, error) {
	if o.Bali != "" {
		return o.Bali, nil
	}
	return os.Executable()
}

func commandLine(argv []string) string {
	quoted := make([]string, len(argv))
	for i, a := range argv {
		// systemd.service(5): $ starts a variable in ExecStart=
		quoted[i] = strings.ReplaceAll(quoteUnit(a), "$", "$$")
	}
	return strings.Join(quoted, " ")
}

// specifiers keeps systemd from expanding %.
func specifiers(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// quoteUnit quotes a word as systemd.syntax(7) says.
func quoteUnit(s string) string {
	s = specifiers(s)
	if s != "" && !strings.ContainsAny(s, " \t\"'\\;") {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
