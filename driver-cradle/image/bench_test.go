package image

import (
	"bytes"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// BenchmarkPullCached is the time that a pod's start pays for its image.
func BenchmarkPullCached(b *testing.B) {
	r := startRegistry(b, nil)
	ref := r.push(b, "x:1", makeImage(b, v1.Config{}, tarLayer(b, makeTar(b, reg("a", "x"))), tarLayer(b, makeTar(b, reg("b", "x")))))
	s := openStore(b)
	pull(b, s, ref, PullOptions{})
	for b.Loop() {
		pull(b, s, ref, PullOptions{})
	}
}

// BenchmarkConvert turns a gzipped layer of 127 MB into an ext4 file: from the network's last byte to the rename.
func BenchmarkConvert(b *testing.B) {
	r := startRegistry(b, nil)
	var entries []entry
	text := []byte(randomText(1 << 20))
	for i := range text {
		text[i] = "etaoin shrdlu\n"[text[i]%14] // compresses about as well as programs do
	}
	for i := range 127 {
		entries = append(entries, reg(string(rune('a'+i%26))+"/"+string(rune('a'+i/26)), string(bytes.ToUpper(text))))
		text = append(text[i:], text[:i]...)
	}
	data := makeTar(b, entries...)
	blob := gzipped(b, data)
	ref := r.push(b, "x:1", makeImage(b, v1.Config{}, blobLayer(blob, types.OCILayer, digestOf(data))))
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		pull(b, openStore(b), ref, PullOptions{})
	}
}
