package provider

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/internal/tunnel"
	"github.com/cradlestack/cradlestack/spec"
)

// images are those that instances are known to run, by the ids of these. They never change in one.
func images(instances types.List) map[string]types.Map {
	all := map[string]types.Map{}
	for _, e := range instances.Elements() {
		o, ok := e.(types.Object)
		if !ok {
			continue
		}
		id, _ := o.Attributes()["id"].(types.String)
		if m, ok := o.Attributes()["images"].(types.Map); ok && len(m.Elements()) > 0 {
			all[id.ValueString()] = m
		}
	}
	return all
}

// images tells, and with ask asks a pod, which images its containers run, unless that is known; it is nothing while the pod does not answer.
func (c *cluster) images(ctx context.Context, f *foundPod, a *api.AllocationListStub, known types.Map, ask bool) types.Map {
	if len(known.Elements()) > 0 {
		return known
	}
	found := map[string]attr.Value{}
	var all []struct {
		Names   []string
		ImageID string
	}
	if ask && a.ClientStatus == api.AllocClientStatusRunning && c.askPod(ctx, f.options.Namespace, a.ID, f.pod.Containers[0].Name, "/containers/json?all=1", &all) == nil {
		for _, one := range all {
			if len(one.Names) > 0 && len(one.Names[0]) > 1 && one.ImageID != "" {
				found[one.Names[0][1:]] = types.StringValue(one.ImageID)
			}
		}
	}
	return types.MapValueMust(types.StringType, found)
}

// maxPodAnswer bounds what is read of a pod's answer, which is its containers' word.
const maxPodAnswer = 4 << 20

// askPod asks docker's API that each pod has.
func (c *cluster) askPod(ctx context.Context, namespace, alloc, task, path string, out any) error {
	ctx, cancel := context.WithTimeout(ctx, logsTimeout)
	defer cancel()
	config := *c.config
	config.Namespace = namespace
	conn, err := tunnel.Dial(ctx, tunnel.Target{Config: &config, Alloc: alloc, Task: task})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://pod"+path, nil)
	if err != nil {
		return err
	}
	if err := req.Write(conn); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxPodAnswer)), req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("the pod answers %s", answer.Status)
	}
	return json.NewDecoder(answer.Body).Decode(out)
}

// untold is what a pod has that no attribute says, by the names that it has in a job's file.
func untold(p *spec.Pod) (names []string) {
	said := map[string]bool{}
	for i := range p.Containers {
		c := &p.Containers[i]
		for name, is := range map[string]bool{
			"group_add": len(c.GroupAdd) > 0, "tty": c.TTY, "interactive": c.OpenStdin, "stdin_once": c.StdinOnce, "no_new_privileges": c.NoNewPrivs, "masked_paths": c.MaskedPaths != nil,
			"readonly_paths": c.ReadonlyPaths != nil, "writable_cgroups": c.WritableCgroups, "tmpfs": len(c.Tmpfs) > 0, "shm_size": c.ShmSize != 0 && c.ShmSize != spec.DefaultShmSize, "ulimit": len(c.Ulimits) > 0,
			"sysctl": len(c.Sysctls) > 0, "devices": len(c.Devices) > 0, "pids_limit": c.Resources.Pids != 0, "cpu_shares": c.Resources.CPUShares != 0, "cpus": c.Resources.CPUs != 0,
			"oom_score_adj": c.Resources.OOMScoreAdj != 0, "log_size": c.Logs.MaxSize != 0, "domainname": c.Domainname != "", "healthcheck.start_interval": c.Healthcheck != nil && c.Healthcheck.StartInterval != 0,
		} {
			said[name] = said[name] || is
		}
		for _, m := range c.Mounts {
			said["volume_mount"] = said["volume_mount"] || m.Raw
		}
	}
	for _, v := range p.Volumes {
		said["mount.transport"] = said["mount.transport"] || v.Directory != nil && v.Directory.Transport != ""
	}
	n := &p.Network
	said["mac_address"], said["dns_servers"], said["extra_hosts"] = n.MAC != "", len(n.DNS) > 0, len(n.ExtraHosts) > 0
	said["dns_search_domains"], said["dns_options"] = len(n.DNSSearch) > 0, len(n.DNSOptions) > 0
	for _, name := range slices.Sorted(maps.Keys(said)) {
		if said[name] {
			names = append(names, "task.config."+name)
		}
	}
	return names
}
