package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/dockerapi/server"
)

// collectEvery is how often garbage is collected.
const collectEvery = time.Hour

// imageOptions are those of the registry.
type imageOptions struct {
	folder, key   string
	s3            registry.S3
	listen, url   string
	cert, certKey string
	insecure      []string
	grace         time.Duration
	collect       bool
}

func (o *imageOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&o.folder, "images", "", "folder that keeps the images; empty, and no --images-bucket: there are none")
	f.StringVar(&o.s3.Bucket, "images-bucket", "", "S3 bucket that keeps the images, in place of --images; $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY open it")
	f.StringVar(&o.s3.Endpoint, "images-endpoint", "", "address of the bucket's server: https://s3.example.org (default: Amazon's)")
	f.StringVar(&o.s3.Region, "images-region", "us-east-1", "the bucket's region")
	f.StringVar(&o.s3.Prefix, "images-prefix", "", "beginning of all keys in the bucket")
	f.BoolVar(&o.s3.PathStyle, "images-path-style", false, "the bucket's name stands in the path, not in the host's name")
	f.StringVar(&o.key, "images-key", "", "PEM file of the key that signs tokens of the registry, the same for all servers of a bucket (default: token.key in the folder, made when it is missing)")
	f.BoolVar(&o.collect, "images-collect", true, "free the space of images that are gone, every hour; of several servers with the same images, let one")
	f.DurationVar(&o.grace, "images-grace", 24*time.Hour, "leave alone what is younger than this when space is freed: longer than any push takes")
	f.StringVar(&o.listen, "registry-listen", "", "address at which nodes and docker push find the registry: 0.0.0.0:5000; a loopback address needs no certificate")
	f.StringVar(&o.url, "registry-url", "", "where they find it, if that is not the address: https://registry.example.org")
	f.StringVar(&o.cert, "registry-cert", "", "PEM file of the registry's certificate (default: --tls-cert)")
	f.StringVar(&o.certKey, "registry-key", "", "PEM file of its key (default: --tls-key)")
	f.StringArrayVar(&o.insecure, "insecure-registry", nil, "HOST[:PORT] of a registry that may be asked without TLS, and may be at this machine; repeatable")
}

// An imageService is the registry with what runs beside it.
type imageService struct {
	registry *registry.Registry // nil: no images
	host     string             // where nodes find it, HOST:PORT; "" for nowhere
	http     *http.Server
	cancel   context.CancelFunc
	work     sync.WaitGroup
}

// open opens the registry, and serves it.
func (o *imageOptions) open(ctx context.Context, all *options) (_ *imageService, err error) {
	if o.folder == "" && o.s3.Bucket == "" {
		if o.listen != "" {
			return nil, errors.New("--registry-listen needs --images or --images-bucket")
		}
		return &imageService{cancel: func() {}}, nil
	}
	c := registry.Config{Folder: o.folder, URL: o.url, Insecure: o.insecure, Grace: o.grace, Log: all.Log}
	if o.s3.Bucket != "" {
		c.S3 = &o.s3
	}
	if o.key != "" {
		data, err := os.ReadFile(o.key)
		if err != nil {
			return nil, fmt.Errorf("--images-key: %w", err)
		}
		if c.Key, err = registry.ParseKey(data); err != nil {
			return nil, fmt.Errorf("--images-key: %s: %w", o.key, err)
		}
	}
	nomad := all.Nomad
	if nomad == nil {
		nomad = api.DefaultConfig()
	}
	client, err := api.NewClient(nomad)
	if err != nil {
		return nil, err
	}
	c.WorkloadKeys = server.WorkloadKeys(client)
	at, err := url.Parse(o.url)
	if err != nil || o.url != "" && (at.Host == "" || at.Scheme != "https" && at.Scheme != "http") {
		return nil, fmt.Errorf("--registry-url %s: write https://HOST[:PORT]", o.url)
	}
	listener, err := o.listener(all)
	if err != nil {
		return nil, fmt.Errorf("--registry-listen: %w", err)
	}
	s := &imageService{}
	if s.registry, err = registry.Open(ctx, c); err != nil {
		if listener != nil {
			listener.Close()
		}
		return nil, err
	}
	ctx, s.cancel = context.WithCancel(ctx)
	if listener != nil {
		s.host = listener.Addr().String()
	}
	if o.url != "" {
		s.host = at.Host
	}
	if listener != nil {
		s.http = &http.Server{Handler: s.registry.Handler(), ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, ErrorLog: slog.NewLogLogger(all.Log.Handler(), slog.LevelDebug)}
		s.work.Go(func() {
			if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				all.Log.Error("the registry is not served any more", "error", err)
			}
		})
		all.Log.Info("serving the registry", "address", listener.Addr().String())
	}
	if o.collect {
		s.work.Go(func() { collect(ctx, s.registry, all.Log) })
	}
	return s, nil
}

// listener is where the registry is served; nil for nowhere.
func (o *imageOptions) listener(all *options) (net.Listener, error) {
	if o.listen == "" {
		return nil, nil //nolint:nilnil // nowhere is no listener
	}
	cert, key := o.cert, o.certKey
	if cert == "" && key == "" {
		cert, key = all.tls.Cert, all.tls.Key
	}
	l, err := net.Listen("tcp", o.listen)
	if err != nil {
		return nil, err
	}
	if l.Addr().(*net.TCPAddr).IP.IsUnspecified() && o.url == "" {
		l.Close()
		return nil, fmt.Errorf("%s is no address at which nodes find the registry: give --registry-url https://HOST:PORT", o.listen)
	}
	if cert == "" && key == "" {
		if l.Addr().(*net.TCPAddr).IP.IsLoopback() {
			return l, nil
		}
		l.Close()
		return nil, fmt.Errorf("%s is no loopback address: tokens would travel in the clear; give --registry-cert and --registry-key", o.listen)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		l.Close()
		return nil, err
	}
	return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}), nil
}

// collect frees space every now and then.
func collect(ctx context.Context, r *registry.Registry, log *slog.Logger) {
	for {
		select {
		case <-time.After(collectEvery):
		case <-ctx.Done():
			return
		}
		switch c, err := r.Collect(ctx); {
		case err != nil && ctx.Err() == nil:
			log.Error("free the space of images that are gone", "error", err)
		case err == nil && c.Blobs > 0:
			log.Info("freed the space of images that are gone", "blobs", c.Blobs, "bytes", c.Bytes)
		}
	}
}

// close ends it. Whoever pulls or pushes is cut off, and can go on with another server.
func (s *imageService) close() {
	s.cancel()
	if s.http != nil {
		s.http.Close()
	}
	s.work.Wait()
	if s.registry != nil {
		s.registry.Close()
	}
}
