// Greedy decoding of a package through ONNX Runtime's C++ interface.
//
//   minimal MODEL [--library FILE] [--room TOKENS] ID...
//
// MODEL is the package's model.onnx, FILE its native operators (sambay_ops.so, .dll or .dylib), which
// are optional; the IDs are the prompt. Prints the ids of the answer, its end token last.
//
// Every state is bound once as past and as present, so a step copies none of them.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Options {
  std::filesystem::path model, library;
  int64_t room = 512;  // tokens of prompt and answer together
  std::vector<int64_t> prompt;
};

// Sizes and end tokens, from the model's metadata.
struct Facts {
  int64_t window, vocabulary, most;  // most tokens of one call
  std::vector<int64_t> ends;
};

int64_t whole_number(const std::string& text) {
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) {
    throw std::invalid_argument("'" + text + "' is no number: give token ids");
  }
  return std::stoll(text);
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const bool named = argument == "--library" || argument == "--room";
    if (named && i + 1 == count) throw std::invalid_argument(argument + " needs a value");
    if (argument == "--library") {
      options.library = arguments[++i];
    } else if (argument == "--room") {
      options.room = whole_number(arguments[++i]);
    } else if (options.model.empty()) {
      options.model = argument;
    } else {
      options.prompt.push_back(whole_number(argument));
    }
  }
  if (options.prompt.empty()) {
    throw std::invalid_argument("usage: minimal MODEL [--library FILE] [--room TOKENS] ID...");
  }
  return options;
}

// Numbers of one key of a flat JSON object; an application will have a JSON library for this.
std::vector<int64_t> numbers(const std::string& json, const std::string& key) {
  std::smatch found;
  const std::regex entry("\"" + key + "\"\\s*:\\s*(\\[[^\\]]*\\]|-?\\d+)");
  if (!std::regex_search(json, found, entry)) {
    throw std::runtime_error("the model's metadata has no " + key + ": export it again");
  }
  const std::string value = found[1];
  const std::regex number("-?\\d+");
  std::vector<int64_t> result;
  for (std::sregex_iterator it(value.begin(), value.end(), number), end; it != end; ++it) {
    result.push_back(std::stoll(it->str()));
  }
  return result;
}

Facts read_facts(const Ort::Session& session, int64_t room) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto metadata = session.GetModelMetadata();
  const auto config = metadata.LookupCustomMetadataMapAllocated("sambay.config", allocator);
  if (!config) throw std::runtime_error("this model was not written by phi4export");
  const std::string json = config.get();
  // Packages for some providers take so many tokens in one call at most.
  const auto most = metadata.LookupCustomMetadataMapAllocated("sambay.max_tokens", allocator);
  return {numbers(json, "sliding_window").at(0), numbers(json, "vocab_size").at(0),
          most ? std::stoll(most.get()) : room, numbers(json, "eos_token_ids")};
}

Ort::Session open(const Ort::Env& env, const Options& options) {
  Ort::SessionOptions settings;
  // For the CPU provider only. Without the library the operators' bodies in the file run.
  if (!options.library.empty()) settings.RegisterCustomOpsLibrary(options.library.c_str());
  return Ort::Session(env, options.model.c_str(), settings);
}

// Bind zeros as each past input and as its present output; returns the memory behind them.
std::deque<std::vector<uint8_t>> bind_states(const Ort::Session& session, const Options& options,
                                             const Facts& facts, Ort::IoBinding& binding) {
  const std::string past = "past_key_values.";
  const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::AllocatorWithDefaultOptions allocator;
  std::deque<std::vector<uint8_t>> memory;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const std::string name = session.GetInputNameAllocated(i, allocator).get();
    if (name.rfind(past, 0) != 0) continue;
    const auto type = session.GetInputTypeInfo(i);
    const auto tensor = type.GetTensorTypeAndShapeInfo();
    auto shape = tensor.GetShape();  // -1 where a dimension has a name
    std::vector<const char*> axes(shape.size());
    tensor.GetSymbolicDimensions(axes.data(), axes.size());
    int64_t elements = 1;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (!std::strcmp(axes[axis], "batch")) shape[axis] = 1;
      if (!std::strcmp(axes[axis], "window")) shape[axis] = facts.window;
      if (!std::strcmp(axes[axis], "capacity")) shape[axis] = options.room;
      elements *= shape[axis];
    }
    const auto dtype = tensor.GetElementType();
    const size_t width = dtype == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? 4
                         : dtype == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                                                                          : 1;
    auto& bytes = memory.emplace_back(elements * width);  // zeros
    const auto value = Ort::Value::CreateTensor(cpu, bytes.data(), bytes.size(), shape.data(),
                                                shape.size(), dtype);
    binding.BindInput(name.c_str(), value);
    binding.BindOutput(("present." + name.substr(past.size())).c_str(), value);  // in place
  }
  return memory;
}

// Not every kernel looks whether a token is one: an embedding would be read beyond its end.
void check(const Options& options, const Facts& facts) {
  for (const int64_t id : options.prompt) {
    if (id >= facts.vocabulary) {
      throw std::invalid_argument("token " + std::to_string(id) + " is not of the vocabulary of " +
                                  std::to_string(facts.vocabulary));
    }
  }
  if (static_cast<int64_t>(options.prompt.size()) > options.room) {
    throw std::invalid_argument("the prompt has " + std::to_string(options.prompt.size()) +
                                " tokens: give --room for it and the answer");
  }
}

void decode(Ort::Session& session, const Options& options) {
  const Facts facts = read_facts(session, options.room);
  check(options, facts);
  Ort::IoBinding binding(session);
  const auto states = bind_states(session, options, facts, binding);
  const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  // One mask of full length serves every step: columns after the last token are ignored.
  std::vector<int64_t> mask(options.room), mask_shape{1, options.room};
  binding.BindInput("attention_mask", Ort::Value::CreateTensor<int64_t>(
                                          cpu, mask.data(), mask.size(), mask_shape.data(), 2));
  std::vector<float> logits(facts.vocabulary);
  const std::vector<int64_t> logits_shape{1, 1, facts.vocabulary};
  binding.BindOutput("logits", Ort::Value::CreateTensor<float>(cpu, logits.data(), logits.size(),
                                                               logits_shape.data(), 3));
  std::vector<int64_t> ids = options.prompt;
  int64_t length = 0;
  while (length + static_cast<int64_t>(ids.size()) <= options.room) {
    const auto end = length + static_cast<int64_t>(ids.size());
    for (int64_t* piece = ids.data(); length < end;) {
      const int64_t shape[] = {1, std::min(facts.most, end - length)};
      std::fill_n(mask.begin() + length, shape[1], 1);
      binding.BindInput("input_ids",
                        Ort::Value::CreateTensor<int64_t>(cpu, piece, shape[1], shape, 2));
      session.Run(Ort::RunOptions{}, binding);
      length += shape[1];
      piece += shape[1];
    }
    const auto best = std::max_element(logits.begin(), logits.end());
    ids = {std::distance(logits.begin(), best)};
    std::cout << ids[0] << std::endl;
    if (std::count(facts.ends.begin(), facts.ends.end(), ids[0])) return;
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    const Ort::Env env;
    Ort::Session session = open(env, options);
    decode(session, options);
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::cerr << error.what() << std::endl;
    return 2;
  }
  return 0;
}
