// What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "completion/v1/completion.grpc.pb.h"
#include "google/rpc/status.pb.h"

using completion::v1::CompletionService;
using completion::v1::CreateCompletionRequest;
using completion::v1::CreateCompletionResponse;
using completion::v1::ErrorResponse;

namespace {

const char* const kModel = "gpt-3.5-turbo-instruct";

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// One call's context, which sends the key.
std::unique_ptr<grpc::ClientContext> context() {
  auto result = std::make_unique<grpc::ClientContext>();
  result->AddMetadata("authorization", "Bearer " + environment("API_KEY", "YOUR_API_KEY"));
  return result;
}

void expect(const grpc::Status& status, grpc::StatusCode code) {
  if (status.error_code() != code) {
    throw std::runtime_error("unexpected status " + std::to_string(status.error_code()) + ": " + status.error_message());
  }
}

CreateCompletionRequest story() {
  CreateCompletionRequest request;
  request.set_model(kModel);
  request.set_text("Once upon a time");
  request.set_max_tokens(24);
  request.set_temperature(0.8f);
  request.set_seed(7);
  return request;
}

CreateCompletionRequest endless() {
  CreateCompletionRequest request;
  request.set_model(kModel);
  request.set_text("Once upon a time");
  request.set_max_tokens(4000);
  request.set_ignore_eos(true);
  return request;
}

// Prints the whole answer, then the same text as it comes.
void complete(CompletionService::Stub& stub) {
  CreateCompletionResponse answer;
  expect(stub.CreateCompletion(context().get(), story(), &answer), grpc::StatusCode::OK);
  std::printf("unary:%s\nstream:", answer.choices(0).text().c_str());
  const auto call = context();
  const auto reader = stub.StreamCompletion(call.get(), story());
  CreateCompletionResponse piece;
  while (reader->Read(&piece)) std::printf("%s", piece.choices(0).text().c_str());
  expect(reader->Finish(), grpc::StatusCode::OK);
  std::printf("\n");
}

// Prints each token with its log probability.
void scores(CompletionService::Stub& stub) {
  CreateCompletionRequest request;
  request.set_model(kModel);
  request.set_text("The capital of France is");
  request.set_max_tokens(4);
  request.set_temperature(0);
  request.set_logprobs(1);
  CreateCompletionResponse answer;
  expect(stub.CreateCompletion(context().get(), request, &answer), grpc::StatusCode::OK);
  const auto& logprobs = answer.choices(0).logprobs();
  for (int i = 0; i < logprobs.tokens_size(); ++i) {
    std::printf("logprob:%s %.3f\n", logprobs.tokens(i).c_str(), logprobs.token_logprobs(i).logprob());
  }
}

// Prints a typed error.
void refusal(CompletionService::Stub& stub) {
  CreateCompletionRequest request;
  request.set_model(kModel);
  request.set_max_tokens(-1);
  CreateCompletionResponse answer;
  const grpc::Status status = stub.CreateCompletion(context().get(), request, &answer);
  expect(status, grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::Status details;
  ErrorResponse response;
  if (!details.ParseFromString(status.error_details()) || !details.details(0).UnpackTo(&response)) {
    throw std::runtime_error("the refusal has no typed detail");
  }
  const auto& error = response.error();
  std::printf("error: %s %s %s\n", error.param().c_str(), error.code().c_str(), error.message().c_str());
}

// Gives up when the answer is not there after 0.3 s.
void deadline(CompletionService::Stub& stub) {
  const auto call = context();
  call->set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  CreateCompletionResponse answer;
  expect(stub.CreateCompletion(call.get(), endless(), &answer), grpc::StatusCode::DEADLINE_EXCEEDED);
  std::printf("deadline exceeded\n");
}

// Cancels a stream after three pieces; the service stops generating at once.
void cancel(CompletionService::Stub& stub) {
  const auto call = context();
  const auto reader = stub.StreamCompletion(call.get(), endless());
  CreateCompletionResponse piece;
  int pieces = 0;
  while (pieces < 3 && reader->Read(&piece)) ++pieces;
  call->TryCancel();
  expect(reader->Finish(), grpc::StatusCode::CANCELLED);
  std::printf("cancelled after %d pieces\n", pieces);
}

}  // namespace

int main() try {
  const auto channel =
      grpc::CreateChannel(environment("COMPLETION_ADDRESS", "127.0.0.1:50051"), grpc::InsecureChannelCredentials());
  const auto stub = CompletionService::NewStub(channel);
  complete(*stub);
  scores(*stub);
  refusal(*stub);
  deadline(*stub);
  cancel(*stub);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
