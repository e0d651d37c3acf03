//go:build unix

// Bench measures the client's CPU per call, with one call in flight and with 16: the same echo over TLS 1.3 and one connection.
//
//	go run ./bench      # with `zcproto serve` of this repository
//	bench/compare       # beside grpc-go, from Debian's golang-google-grpc-dev
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zcproto/zcproto/clients/go/zcproto"
)

var (
	seconds = flag.Float64("seconds", 2, "duration of one measurement")
	rounds  = flag.Int("rounds", 5, "measurements of each kind, of which the median counts")
)

// peer is a client with its server. start returns a function that makes one call, and one that ends both.
type peer struct {
	name  string
	start func(ctx context.Context) (call func() error, stop func(), err error)
}

// peers are measured in turn. grpc.go adds another one.
var peers = []peer{{"this client", startZcproto}}

// commands are run instead of the benchmark if they are the first argument.
var commands = map[string]func() error{}

func main() {
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		check(commands[os.Args[1]]())
		return
	}
	flag.Parse()
	ctx := context.Background()
	var calls []func() error
	for _, peer := range peers {
		call, stop, err := peer.start(ctx)
		check(err)
		defer stop()
		_, _, err = measure(call, 16, 200*time.Millisecond) // warm up
		check(err)
		calls = append(calls, call)
	}
	fmt.Println("| concurrent calls | client | calls/s | client CPU per call |")
	fmt.Println("|---|---|---|---|")
	for _, inFlight := range []int{1, 16} {
		rates, costs := make([][]float64, len(peers)), make([][]float64, len(peers))
		for range *rounds {
			for index, call := range calls {
				rate, cost, err := measure(call, inFlight, time.Duration(*seconds*float64(time.Second)))
				check(err)
				rates[index], costs[index] = append(rates[index], rate), append(costs[index], cost)
			}
		}
		for index, peer := range peers {
			fmt.Printf("| %d | %s | %.0f | %.1f µs |\n", inFlight, peer.name, median(rates[index]), median(costs[index]))
		}
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// measure calls from several goroutines. It returns calls per second, and this process's microseconds of CPU per call.
func measure(call func() error, inFlight int, duration time.Duration) (rate, cost float64, err error) {
	var workers sync.WaitGroup
	counts, errs := make([]int, inFlight), make([]error, inFlight)
	began, cpu := time.Now(), cpuTime()
	end := began.Add(duration)
	for worker := range inFlight {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for time.Now().Before(end) && errs[worker] == nil {
				errs[worker] = call()
				counts[worker]++
			}
		}()
	}
	workers.Wait()
	took, used := time.Since(began), cpuTime()-cpu
	total := 0
	for worker, count := range counts {
		total += count
		if errs[worker] != nil {
			return 0, 0, errs[worker]
		}
	}
	return float64(total) / took.Seconds(), float64(used.Nanoseconds()) / 1_000 / float64(total), nil
}

func cpuTime() time.Duration {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// startZcproto starts `zcproto serve` of this repository in a new home.
func startZcproto(ctx context.Context) (call func() error, stop func(), err error) {
	home, err := os.MkdirTemp("", "zcproto-bench-")
	if err != nil {
		return nil, nil, err
	}
	python := os.Getenv("ZCPROTO_PYTHON")
	if python == "" {
		python = "python3"
	}
	config := "[certificates]\nkey_types = [\"ecdsa-p256\"]\n"
	if err := os.WriteFile(filepath.Join(home, "config.toml"), []byte(config), 0o600); err != nil {
		return nil, nil, err
	}
	key, err := exec.Command(python, "-m", "zcproto", "--home", home, "user", "add", "ada").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("zcproto user add: %w; set ZCPROTO_PYTHON to a Python that has zcproto", err)
	}
	server := exec.Command(python, "-m", "zcproto", "--home", home, "serve", "--port", "0")
	address, err := startServer(server, regexp.MustCompile(`listening on .*:(\d+)`))
	if err != nil {
		return nil, nil, err
	}
	client, err := zcproto.Dial(ctx, "localhost:"+address, zcproto.Options{
		Credentials: zcproto.APIKey("ada", strings.TrimSpace(string(key))),
		CAFile:      filepath.Join(home, "certs/ca.crt"),
		Home:        home,
	})
	if err != nil {
		return nil, nil, err
	}
	type message struct {
		Word string `msgpack:"word"`
	}
	call = func() error {
		var answer message
		err := client.Call(ctx, "echo", &message{"hello"}, &answer)
		if err == nil && answer.Word != "hello" {
			err = fmt.Errorf("got %q", answer.Word)
		}
		return err
	}
	stop = func() {
		_ = client.Close()
		_ = server.Process.Signal(syscall.SIGTERM)
		_ = server.Wait()
		_ = os.RemoveAll(home)
	}
	return call, stop, nil
}

// startServer starts a process and returns what it prints of its address.
func startServer(server *exec.Cmd, pattern *regexp.Regexp) (string, error) {
	output, err := server.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := server.Start(); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	found := pattern.FindStringSubmatch(line)
	if found == nil {
		return "", fmt.Errorf("the server did not start: %q, %v", line, err)
	}
	return found[1], nil
}
