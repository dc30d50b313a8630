package wire

import (
	"bufio"
	"bytes"
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func seeds(f *testing.F) {
	n := strings.Repeat("0", nonceLen)
	for _, s := range []string{
		"", "\xff", greetMark, greetHello + n, greetHello + n + "\n", greetHello + n + "\n" + greetBegin + n + "\n", greetHello + n + "\n" + greetBirth + n + "\n\x00\x01",
		greetHello + "\xff" + greetReady + n + "\n", unstick(),
		greetReady + n + "\n\x00\x00\x00\x01\x00\x00\x00\x01\xff\xff\xff\xff", greetReady + n + "\n\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02",
	} {
		f.Add([]byte(s))
	}
}

// Whatever comes before a greeting, the greeting is found and what follows it is untouched.
func FuzzReadGreeting(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, garbage []byte) {
		nonce := strings.Repeat("7", nonceLen)
		if bytes.Contains(garbage, []byte(nonce)) {
			t.Skip("garbage that knows the nonce")
		}
		tail := "\x00what follows\xff"
		r := bufio.NewReaderSize(bytes.NewReader(append(garbage, greetBegin+nonce+"\n"+tail...)), 128)
		for {
			kind, n, err := readGreeting(r)
			if err != nil {
				t.Fatalf("greeting not found: %v", err)
			}
			if !isNonce(n) || len(n) != nonceLen {
				t.Fatalf("nonce %q", n)
			}
			if kind == greetBegin && n == nonce {
				break
			}
		}
		rest, err := r.Peek(len(tail))
		if string(rest) != tail {
			t.Fatalf("what follows is %q: %v", rest, err)
		}
	})
}

// A host survives whatever a guest sends, before and after the greeting.
func FuzzHostileGuest(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine()
			h := l.connect()
			l.inject(nil, data)
			go func() {
				_, nonce, err := readGreeting(bufio.NewReader(&l.guest))
				if err != nil {
					return
				}
				l.inject(nil, append([]byte(greetReady+nonce+"\n"), data...))
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			s, err := Dial(ctx, h, nil)
			if err != nil {
				t.Fatalf("a guest that answers is not heard: %v", err)
			}
			if c, err := s.Open(ctx); err == nil {
				c.SetDeadline(time.Now().Add(time.Second))
				c.Write([]byte("hello"))
				c.Read(make([]byte, 100))
				c.Close()
			}
			s.Close()
		})
	})
}
