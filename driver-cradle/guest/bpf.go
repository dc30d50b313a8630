package guest

// A bpfInsn is struct bpf_insn of linux/bpf.h.
type bpfInsn struct {
	code uint8
	regs uint8 // destination, source << 4
	off  int16
	imm  int32
}

// reg are an instruction's registers.
func reg(dst, src uint8) uint8 { return dst | src<<4 }
