//go:build vm && soak

package main

import "testing"

func TestVMSoakKilledAtAnyMoment(t *testing.T) { killedAtAnyMoment(t, 100) }

func TestVMSoakSummonKilledAtAnyMoment(t *testing.T) { summonKilledAtAnyMoment(t, 100) }

func TestVMSoakKilledAtEveryStep(t *testing.T) { killedAtSteps(t, 0, 20) }

func TestVMSoakEndedWhileStarting(t *testing.T) { endedWhileStarting(t, 100) }

func TestVMSoakManyDirectories(t *testing.T) { manyDirectories(t, 200) }
