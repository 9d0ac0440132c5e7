// What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "completion.example/stubs/completion/v1"
)

const model = "gpt-3.5-turbo-instruct"

func prompt() *pb.CreateCompletionRequest_Text {
	return &pb.CreateCompletionRequest_Text{Text: "Once upon a time"}
}

func story() *pb.CreateCompletionRequest {
	return &pb.CreateCompletionRequest{
		Model:       proto.String(model),
		Prompt:      prompt(),
		MaxTokens:   proto.Int32(24),
		Temperature: proto.Float32(0.8),
		Seed:        proto.Int64(7),
	}
}

func long() *pb.CreateCompletionRequest {
	return &pb.CreateCompletionRequest{
		Model:     proto.String(model),
		Prompt:    prompt(),
		MaxTokens: proto.Int32(4000),
		IgnoreEos: proto.Bool(true),
	}
}

// complete prints the whole answer, then the same text as it comes.
func complete(ctx context.Context, client pb.CompletionServiceClient) error {
	answer, err := client.CreateCompletion(ctx, story())
	if err != nil {
		return err
	}
	fmt.Printf("unary:%s\n", answer.Choices[0].Text)
	stream, err := client.StreamCompletion(ctx, story())
	if err != nil {
		return err
	}
	fmt.Print("stream:")
	for {
		piece, err := stream.Recv()
		if err == io.EOF {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(piece.Choices[0].Text)
	}
}

// scores prints each token with its log probability.
func scores(ctx context.Context, client pb.CompletionServiceClient) error {
	answer, err := client.CreateCompletion(ctx, &pb.CreateCompletionRequest{
		Model:       proto.String(model),
		Prompt:      &pb.CreateCompletionRequest_Text{Text: "The capital of France is"},
		MaxTokens:   proto.Int32(4),
		Temperature: proto.Float32(0),
		Logprobs:    proto.Int32(1),
	})
	if err != nil {
		return err
	}
	logprobs := answer.Choices[0].GetLogprobs()
	for i, token := range logprobs.Tokens {
		fmt.Printf("logprob:%s %.3f\n", token, logprobs.TokenLogprobs[i].GetLogprob())
	}
	return nil
}

// refusal prints a typed error.
func refusal(ctx context.Context, client pb.CompletionServiceClient) error {
	_, err := client.CreateCompletion(ctx, &pb.CreateCompletionRequest{
		Model:     proto.String(model),
		MaxTokens: proto.Int32(-1),
	})
	if status.Code(err) != codes.InvalidArgument {
		return fmt.Errorf("a refusal was expected, not %v", err)
	}
	for _, detail := range status.Convert(err).Details() {
		if response, ok := detail.(*pb.ErrorResponse); ok {
			refused := response.Error
			fmt.Printf("error: %s %s %s\n", refused.GetParam(), refused.GetCode(), refused.Message)
		}
	}
	return nil
}

// deadline gives up when the answer is not there after 0.3 s.
func deadline(ctx context.Context, client pb.CompletionServiceClient) error {
	ctx, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if _, err := client.CreateCompletion(ctx, long()); status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("a passed deadline was expected, not %v", err)
	}
	fmt.Println("deadline exceeded")
	return nil
}

// cancel cancels a stream after three pieces; the service stops generating at once.
func cancel(ctx context.Context, client pb.CompletionServiceClient) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	stream, err := client.StreamCompletion(ctx, long())
	if err != nil {
		return err
	}
	for pieces := 0; ; pieces++ {
		if pieces == 3 {
			stop()
		}
		if _, err := stream.Recv(); err != nil {
			if status.Code(err) != codes.Canceled {
				return err
			}
			fmt.Println("cancelled after 3 pieces")
			return nil
		}
	}
}

// withKey sends the key with every call.
type withKey string

func (key withKey) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(key)}, nil
}

func (withKey) RequireTransportSecurity() bool { return false }

func environment(name, otherwise string) string {
	if value, ok := os.LookupEnv(name); ok {
		return value
	}
	return otherwise
}

func main() {
	connection, err := grpc.Dial(
		environment("COMPLETION_ADDRESS", "127.0.0.1:50051"),
		grpc.WithInsecure(),
		grpc.WithPerRPCCredentials(withKey(environment("API_KEY", "YOUR_API_KEY"))),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := pb.NewCompletionServiceClient(connection)
	type step func(context.Context, pb.CompletionServiceClient) error
	for _, step := range []step{complete, scores, refusal, deadline, cancel} {
		if err := step(context.Background(), client); err != nil {
			log.Fatal(err)
		}
	}
}
