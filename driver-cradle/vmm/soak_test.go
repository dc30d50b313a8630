//go:build vm && soak

package vmm

import "testing"

func TestVMSoakTemplateIsTheSameAfter100HostilePods(t *testing.T) { hostilePods(t, 100, 60) }

func TestVMSoakLauncherKilled100Times(t *testing.T) { killLaunchers(t, 100) }

func TestVMSoakStockKernelFromTemplate(t *testing.T) { stockKernel(t, Template) }
