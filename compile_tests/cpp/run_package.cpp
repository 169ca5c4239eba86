// Runs an AOTInductor package in a process without Python.
//
//   run_package PACKAGE DEVICE INPUTS OUTPUTS LIBRARY...
//
// LIBRARY: every path of torch_nvfp4.library_paths(). INPUTS: torch.save of a tuple that has one tuple of CPU tensors a
// call; OUTPUTS gets the results in the same form. The package runs on DEVICE (cpu or cuda).
//
//   g++ -std=c++20 run_package.cpp -I$TORCH/include -L$TORCH/lib -Wl,-rpath,$TORCH/lib -Wl,--no-as-needed -ltorch
//       -ltorch_cpu -lc10 -ldl    (for cuda also -ltorch_cuda; TORCH is the folder of the torch package)
//
// This compiler and the package's ($CXX) link libstdc++ dynamically: a package with one of its own crashes while it is
// loaded.
#include <ATen/core/Tensor.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

void run(const std::string& package, const std::string& device_name, const std::string& inputs,
         const std::string& outputs, const std::vector<std::string>& libraries) {
  // Loading a library registers its ops. The package names them, and looks them up when it is loaded.
  for (const std::string& library : libraries) {
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
  }
  torch::inductor::AOTIModelPackageLoader model(package);
  const c10::Device device(device_name);
  const c10::IValue calls = torch::jit::pickle_load(read_file(inputs));
  std::vector<c10::IValue> results;
  for (const c10::IValue& call : calls.toTupleRef().elements()) {
    std::vector<at::Tensor> arguments;
    for (const c10::IValue& argument : call.toTupleRef().elements())
      arguments.push_back(argument.toTensor().to(device));
    std::vector<c10::IValue> result;
    for (const at::Tensor& output : model.run(arguments)) result.emplace_back(output.cpu());
    results.emplace_back(c10::ivalue::Tuple::create(std::move(result)));
  }
  write_file(outputs, torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(results))));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::cerr << "usage: run_package PACKAGE DEVICE INPUTS OUTPUTS LIBRARY...\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argv[4], {argv + 5, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
