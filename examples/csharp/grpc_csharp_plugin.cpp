// protoc's plugin for C# services. Debian ships gRPC's generator in libgrpc_plugin_support, but no program around it.
// Elsewhere the NuGet package Grpc.Tools brings the same plugin ready-made.
#include <google/protobuf/compiler/code_generator.h>
#include <google/protobuf/compiler/plugin.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream.h>

#include <memory>
#include <string>

namespace pb = google::protobuf;

namespace grpc_csharp_generator {
// Defined in libgrpc_plugin_support, whose headers are not installed.
std::string GetServices(const pb::FileDescriptor* file, bool generate_client, bool generate_server,
                        bool internal_access);
}  // namespace grpc_csharp_generator

namespace {

// "completion_v1" becomes "CompletionV1".
std::string camel_case(const std::string& name) {
  std::string result;
  bool upper = true;
  for (char letter : name) {
    if (letter == '_' || letter == '-') {
      upper = true;
    } else {
      result += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(letter))) : letter;
      upper = false;
    }
  }
  return result;
}

class ClientGenerator : public pb::compiler::CodeGenerator {
 public:
  uint64_t GetSupportedFeatures() const override { return FEATURE_PROTO3_OPTIONAL; }

  bool Generate(const pb::FileDescriptor* file, const std::string&, pb::compiler::GeneratorContext* context,
                std::string*) const override {
    const std::string code = grpc_csharp_generator::GetServices(file, true, false, false);
    if (code.empty()) return true;
    const std::string path = file->name().substr(0, file->name().rfind('.'));
    const std::string name = camel_case(path.substr(path.rfind('/') + 1)) + "Grpc.cs";
    std::unique_ptr<pb::io::ZeroCopyOutputStream> output(context->Open(name));
    pb::io::CodedOutputStream(output.get()).WriteString(code);
    return true;
  }
};

}  // namespace

int main(int argc, char* argv[]) {
  ClientGenerator generator;
  return pb::compiler::PluginMain(argc, argv, &generator);
}
