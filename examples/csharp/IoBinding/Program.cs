// Greedy decoding through plain ONNX Runtime:  dotnet run -- PACKAGE ID...
//
// Compiled and tested on Linux, with .NET 8 and the sources of Microsoft.ML.OnnxRuntime as npm has them
// (version 0.4.9); not run on Windows, nor with the NuGet package that the project names.
//
// The IDs are the prompt's tokens. Prints those of the answer, the end token last. Every state is
// bound once as past and as present, so a step copies none of them.

using System.Text.Json;
using Microsoft.ML.OnnxRuntime;

const string Past = "past_key_values.";
const int Room = 512;  // tokens of prompt and answer together

if (args.Length < 2)
{
    Console.Error.WriteLine("usage: IoBinding PACKAGE ID...");
    return 2;
}
var suffix = OperatingSystem.IsWindows() ? "dll" : OperatingSystem.IsMacOS() ? "dylib" : "so";
var library = Path.Combine(args[0], "sambay_ops." + suffix);
using var options = new SessionOptions();
// For the CPU provider only, and optional: without it the operators' bodies in the file run.
if (File.Exists(library)) options.RegisterCustomOpLibrary(Path.GetFullPath(library));
using var session = new InferenceSession(Path.Combine(args[0], "model.onnx"), options);

var metadata = session.ModelMetadata.CustomMetadataMap;
var facts = JsonDocument.Parse(metadata["sambay.config"]).RootElement;
var ends = facts.GetProperty("eos_token_ids").EnumerateArray().Select(id => id.GetInt64()).ToHashSet();
var sizes = new Dictionary<string, long>
{
    ["batch"] = 1,
    ["window"] = facts.GetProperty("sliding_window").GetInt64(),
    ["capacity"] = Room,
};
// Packages for some providers take so many tokens in one call at most.
var most = metadata.TryGetValue("sambay.max_tokens", out var limit) ? int.Parse(limit) : Room;

using var binding = session.CreateIoBinding();
var states = new List<OrtValue>();  // alive as long as the binding
foreach (var (name, input) in session.InputMetadata)
{
    if (!name.StartsWith(Past)) continue;
    var shape = input.Dimensions
        .Select((size, axis) => size >= 0 ? size : sizes[input.SymbolicDimensions[axis]])
        .ToArray();
    var state = OrtValue.CreateAllocatedTensorValue(
        OrtAllocator.DefaultInstance, input.ElementDataType, shape);
    state.GetTensorMutableRawData().Clear();  // states start as zeros
    binding.BindInput(name, state);
    binding.BindOutput("present." + name[Past.Length..], state);  // the same memory: in place
    states.Add(state);
}
var mask = new long[Room];  // one of full length serves every step
using var maskValue = OrtValue.CreateTensorValueFromMemory(mask, [1, Room]);
binding.BindInput("attention_mask", maskValue);
var logits = new float[facts.GetProperty("vocab_size").GetInt32()];
using var logitsValue = OrtValue.CreateTensorValueFromMemory(logits, [1, 1, logits.Length]);
binding.BindOutput("logits", logitsValue);
using var run = new RunOptions();

var length = 0;
var ids = args[1..].Select(long.Parse).ToArray();
while (length + ids.Length <= Room)
{
    foreach (var piece in ids.Chunk(most))
    {
        Array.Fill(mask, 1L, length, piece.Length);
        using var input = OrtValue.CreateTensorValueFromMemory(piece, [1, piece.Length]);
        binding.BindInput("input_ids", input);
        session.RunWithBinding(run, binding);
        length += piece.Length;
    }
    ids = [Array.IndexOf(logits, logits.Max())];
    Console.WriteLine(ids[0]);
    if (ends.Contains(ids[0])) break;
}
states.ForEach(state => state.Dispose());
return 0;
