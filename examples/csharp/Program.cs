// What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream.
using System.Globalization;
using Completion.V1;
using Grpc.Core;
using Grpc.Core.Interceptors;
using Grpc.Net.Client;

const string Model = "gpt-3.5-turbo-instruct";
var address = Environment.GetEnvironmentVariable("COMPLETION_ADDRESS") ?? "127.0.0.1:50051";
var key = Environment.GetEnvironmentVariable("API_KEY") ?? "YOUR_API_KEY";

var story = new CreateCompletionRequest
{
    Model = Model, Text = "Once upon a time", MaxTokens = 24, Temperature = 0.8f, Seed = 7,
};
var endless = new CreateCompletionRequest
{
    Model = Model, Text = "Once upon a time", MaxTokens = 4000, IgnoreEos = true,
};

using var channel = GrpcChannel.ForAddress($"http://{address}");
var client = new CompletionService.CompletionServiceClient(channel.Intercept(headers =>
{
    headers.Add("authorization", $"Bearer {key}");
    return headers;
}));

await Complete();
await Scores();
await Refusal();
await Deadline();
await Cancel();

// Prints the whole answer, then the same text as it comes.
async Task Complete()
{
    var answer = await client.CreateCompletionAsync(story);
    Console.WriteLine($"unary:{answer.Choices[0].Text}");
    Console.Write("stream:");
    using var call = client.StreamCompletion(story);
    await foreach (var piece in call.ResponseStream.ReadAllAsync())
    {
        Console.Write(piece.Choices[0].Text);
    }
    Console.WriteLine();
}

// Prints each token with its log probability.
async Task Scores()
{
    var answer = await client.CreateCompletionAsync(new CreateCompletionRequest
    {
        Model = Model, Text = "The capital of France is", MaxTokens = 4, Temperature = 0, Logprobs = 1,
    });
    var logprobs = answer.Choices[0].Logprobs;
    foreach (var (token, score) in logprobs.Tokens.Zip(logprobs.TokenLogprobs))
    {
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"logprob:{token} {score.Logprob:F3}"));
    }
}

// Prints a typed error.
async Task Refusal()
{
    try
    {
        await client.CreateCompletionAsync(new CreateCompletionRequest { Model = Model, MaxTokens = -1 });
    }
    catch (RpcException failure) when (failure.StatusCode == StatusCode.InvalidArgument)
    {
        var error = failure.GetRpcStatus()!.GetDetail<ErrorResponse>()!.Error;
        Console.WriteLine($"error: {error.Param} {error.Code} {error.Message}");
    }
}

// Gives up when the answer is not there after 0.3 s.
async Task Deadline()
{
    try
    {
        await client.CreateCompletionAsync(endless, deadline: DateTime.UtcNow.AddMilliseconds(300));
    }
    catch (RpcException failure) when (failure.StatusCode == StatusCode.DeadlineExceeded)
    {
        Console.WriteLine("deadline exceeded");
    }
}

// Cancels a stream after three pieces; the service stops generating at once.
async Task Cancel()
{
    using var stop = new CancellationTokenSource();
    using var call = client.StreamCompletion(endless, cancellationToken: stop.Token);
    var pieces = 0;
    try
    {
        await foreach (var piece in call.ResponseStream.ReadAllAsync())
        {
            // What had already come when the stream was cancelled is not counted.
            if (pieces < 3 && ++pieces == 3) stop.Cancel();
        }
    }
    catch (RpcException failure) when (failure.StatusCode == StatusCode.Cancelled)
    {
        Console.WriteLine($"cancelled after {pieces} pieces");
    }
}
