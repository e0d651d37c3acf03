package zcproto

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	knownHostsFile    = "known_hosts.json"
	maxHosts          = 1_000
	maxKnownHostsSize = 1 << 20
	maxPolicyAge      = 10 * 365 * 86_400 // seconds
	maxUntil          = 1<<53 - 1         // clients in JavaScript share the file
	rewriteAfter      = 86_400            // seconds: each connection extends a policy; write the file only for larger changes
	lockWait          = 10 * time.Second
)

// stsPolicy is what WELCOME announces.
type stsPolicy struct {
	maxAge            int64 // seconds
	includeSubdomains bool
}

// hostPolicy is the end of a policy in seconds since the Unix epoch, and whether it includes subdomains.
type hostPolicy struct {
	Until             int64 `json:"until"`
	IncludeSubdomains bool  `json:"include_subdomains"`
}

// knownHosts are the hosts with an sts policy, which must not be connected to without verification until it ends (RFC 6797
// for native clients). Only verified connections set a policy; max_age 0 removes it; addresses have none. The file is JSON
// of mode 0600, shared with the other clients and replaced atomically under a lock. Its size is limited: the policies that
// end first are dropped. A file that cannot be parsed is an error, never treated as empty.
type knownHosts struct {
	path string
}

var knownHostsLock sync.Mutex // of this process: flock excludes other processes

// learn stores the policy of a host with a verified connection. now is in seconds since the Unix epoch.
func (k knownHosts) learn(host string, sts stsPolicy, now int64) error {
	if isIP(host) {
		return nil
	}
	maxAge := min(sts.maxAge, maxPolicyAge)
	policy := hostPolicy{Until: now + maxAge, IncludeSubdomains: sts.includeSubdomains}
	knownHostsLock.Lock()
	defer knownHostsLock.Unlock()
	hosts, err := k.read()
	if err != nil || isKnown(hosts, host, policy, maxAge, now) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(k.path), 0o700); err != nil {
		return err
	}
	unlock, err := lockFile(k.path+".lock", lockWait)
	if err != nil {
		return err
	}
	defer unlock()
	if hosts, err = k.read(); err != nil {
		return err
	}
	for name, known := range hosts {
		if known.Until <= now {
			delete(hosts, name)
		}
	}
	if maxAge > 0 {
		hosts[host] = policy
	} else {
		delete(hosts, host)
	}
	for len(hosts) > maxHosts {
		first := ""
		for name, known := range hosts {
			if first == "" || known.Until < hosts[first].Until {
				first = name
			}
		}
		delete(hosts, first)
	}
	return k.write(hosts)
}

// isKnown returns whether the stored policy is close enough to skip a write.
func isKnown(hosts map[string]hostPolicy, host string, policy hostPolicy, maxAge, now int64) bool {
	known, found := hosts[host]
	if !found || maxAge == 0 {
		return !found && maxAge == 0
	}
	difference := max(known.Until-policy.Until, policy.Until-known.Until)
	return difference < min(rewriteAfter, max(1, maxAge/2)) && known.Until > now &&
		known.IncludeSubdomains == policy.IncludeSubdomains
}

// require returns a *TLSError if a policy forbids connecting to a host without verification.
func (k knownHosts) require(host string, now int64) error {
	if isIP(host) {
		return nil
	}
	hosts, err := k.read()
	if err != nil {
		return &TLSError{Failure: TLSStsPolicy, Detail: "verification cannot be disabled: " + err.Error(), Cause: err}
	}
	labels := strings.Split(host, ".")
	for start := range labels {
		name := strings.Join(labels[start:], ".")
		known, found := hosts[name]
		if found && known.Until > now && (start == 0 || known.IncludeSubdomains) {
			return &TLSError{Failure: TLSStsPolicy, Detail: fmt.Sprintf(
				"%s requires verified connections for %d more days; leave out InsecureSkipVerify (policy stored in %s)",
				name, (known.Until-now)/86_400+1, wire.Escape(k.path, maxMessage))}
		}
	}
	return nil
}

func (k knownHosts) read() (map[string]hostPolicy, error) {
	file, err := os.Open(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]hostPolicy{}, nil
	}
	if err != nil {
		return nil, k.unreadable(reasonOf(err))
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxKnownHostsSize+1))
	switch {
	case err != nil:
		return nil, k.unreadable(reasonOf(err))
	case len(content) > maxKnownHostsSize:
		return nil, k.unreadable("the file is too large")
	}
	var stored struct {
		Hosts map[string]*struct {
			Until             *int64 `json:"until"`
			IncludeSubdomains *bool  `json:"include_subdomains"`
		} `json:"hosts"`
	}
	if err := json.Unmarshal(content, &stored); err != nil || stored.Hosts == nil {
		return nil, k.unreadable("invalid content")
	}
	hosts := make(map[string]hostPolicy, len(stored.Hosts))
	for name, entry := range stored.Hosts {
		if entry == nil || entry.Until == nil || entry.IncludeSubdomains == nil || max(*entry.Until, -*entry.Until) > maxUntil {
			return nil, k.unreadable("invalid content")
		}
		hosts[name] = hostPolicy{Until: *entry.Until, IncludeSubdomains: *entry.IncludeSubdomains}
	}
	return hosts, nil
}

func (k knownHosts) unreadable(what string) error {
	return configError(wire.Escape(k.path, maxMessage) + ": " + what + "; repair the file, or remove it to forget its hosts")
}

func (k knownHosts) write(hosts map[string]hostPolicy) error {
	content, err := json.MarshalIndent(map[string]any{"hosts": hosts}, "", " ")
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(k.path), "."+filepath.Base(k.path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = file.Write(append(content, '\n'))
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), k.path)
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
	return err
}

// knownHostsIn returns the policies in a folder: by default ZCPROTO_HOME, or else ~/.zeroclaw. It returns nil for a user
// without a home, as in some containers.
func knownHostsIn(home string) *knownHosts {
	if home == "" {
		home = os.Getenv("ZCPROTO_HOME")
	}
	if home == "" {
		user, err := os.UserHomeDir()
		if err != nil || !filepath.IsAbs(user) {
			return nil
		}
		home = filepath.Join(user, ".zeroclaw")
	}
	return &knownHosts{path: filepath.Join(home, knownHostsFile)}
}
