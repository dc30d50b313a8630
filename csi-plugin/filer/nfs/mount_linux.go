package nfs

// mountProcedures are those of MOUNT version 3 (RFC 1813 §5.2), at the same port. Nobody is told who mounts what, or what there is.
var mountProcedures = [...]procedure{
	{}, // NULL
	{run: mnt},
	{run: nothing}, // DUMP
	{},             // UMNT: there is nothing to forget
	{},             // UMNTALL
	{run: nothing}, // EXPORT
}

// procedureNames are those of NFS by number.
var procedureNames = [len(nfsProcedures)]string{
	"NULL", "GETATTR", "SETATTR", "LOOKUP", "ACCESS", "READLINK", "READ", "WRITE", "CREATE", "MKDIR", "SYMLINK", "MKNOD", "REMOVE", "RMDIR", "RENAME", "LINK", "READDIR", "READDIRPLUS",
	"FSSTAT", "FSINFO", "PATHCONF", "COMMIT",
}

// name is what is counted of a call: there are as many as this server knows procedures, whatever clients send.
func (c call) name() string {
	switch {
	case c.program == programMount:
		return "MOUNT"
	case c.program == programNFS && c.version == version3 && c.proc < uint32(len(procedureNames)):
		return procedureNames[c.proc]
	}
	return "other"
}

// mnt gives the handle of an export's root to who knows its path. Whatever is wrong, the answer is the same.
func mnt(x *exchange) status {
	path := x.args.opaque(MaxPath)
	if x.args.bad {
		return garbage
	}
	x.mu.RLock()
	e := x.paths[string(path)]
	x.mu.RUnlock()
	if e == nil {
		x.log.Warn("refused a mount", "client", x.client, "reason", "there is no such export")
		return errAcces
	}
	e.RLock()
	x.export = e
	if e.gone || !e.admits(x.client) {
		x.log.Warn("refused a mount", "client", x.client, "volume", e.Volume, "reason", "it is not for this client")
		return errAcces
	}
	o := object{export: e, tree: &e.tree, fd: int(e.root.Fd())}
	handle, err := o.handle()
	if err != nil {
		return statusOf(err)
	}
	x.guest.Know()
	x.log.Info("mounted", "client", x.client, "volume", e.Volume, "read-only", e.ReadOnly)
	x.out.uint32(uint32(ok))
	x.out.opaque(handle)
	x.out.uint32(1)
	x.out.uint32(authSys)
	return ok
}

// nothing is an empty list.
func nothing(x *exchange) status {
	x.out.bool(false)
	return ok
}
