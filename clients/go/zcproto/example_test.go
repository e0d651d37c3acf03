package zcproto_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/zcproto/zcproto/clients/go/zcproto"
)

func ExampleDial() {
	ctx := context.Background()
	client, err := zcproto.Dial(ctx, "host:7443", zcproto.Options{
		Credentials: zcproto.APIKey("ada", "the key"),
		CAFile:      "ca.crt",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
}

func ExampleSession_Call() {
	var client *zcproto.Client // of Dial
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	order := struct {
		Tea string `msgpack:"tea"`
	}{"green"}
	var placed struct {
		ID int `msgpack:"id"`
	}
	err := client.Call(ctx, "order.place", order, &placed, zcproto.IdempotencyKey("order-7"))
	var failure *zcproto.Error
	switch {
	case errors.Is(err, zcproto.AlreadyExists):
		fmt.Println("it was placed before")
	case errors.As(err, &failure):
		fmt.Println(failure.Message, failure.Details)
	}
}

func ExampleSession_Stream() {
	var client *zcproto.Client // of Dial
	stream := client.Stream(context.Background(), "upload", map[string]any{"name": "x"})
	for chunk := range 3 {
		if err := stream.Send([]byte{byte(chunk)}); err != nil {
			break // the stream has ended: Result has its error
		}
	}
	_ = stream.CloseSend()
	var size int
	if err := stream.Result(&size); err != nil {
		log.Fatal(err)
	}
}

func ExampleItems() {
	var client *zcproto.Client // of Dial
	stream := client.Stream(context.Background(), "words", map[string]any{"text": "to be or not"})
	for word, err := range zcproto.Items[string](stream) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(word)
	}
}

func ExampleSession_Handle() {
	var client *zcproto.Client // of Dial
	err := client.Handle(context.Background(), "approve", func(ctx context.Context, call *zcproto.ServerCall) (any, error) {
		var params struct {
			Tool string `msgpack:"tool"`
		}
		if err := call.Decode(&params); err != nil {
			return nil, err
		}
		if params.Tool == "shell" {
			return nil, zcproto.PermissionDenied
		}
		return true, nil
	})
	if err != nil {
		log.Fatal(err)
	}
}

func ExampleEnroll() {
	ctx, options := context.Background(), zcproto.Options{CAFile: "ca.crt"}
	device, err := zcproto.CreateDevice("laptop.key")
	if err != nil {
		log.Fatal(err)
	}
	user, err := zcproto.Enroll(ctx, "host:7443", "7D9K-X2MP", device, "laptop", options)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(user)
	options.Credentials = zcproto.DeviceKey(device, "laptop")
	client, err := zcproto.Dial(ctx, "host:7443", options)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
}
