// A chat on the console through ONNX Runtime GenAI:  dotnet run -- PACKAGE [PROVIDER]
//
// Not compiled by this project: its machines have no .NET SDK. The calls are those of the sources of
// Microsoft.ML.OnnxRuntimeGenAI; the same steps in Python are tested (tests/end_to_end/test_genai.py).
//
// PROVIDER (such as dml or cuda) replaces the one that genai_config.json names.

using System.Text.Json;
using Microsoft.ML.OnnxRuntimeGenAI;

if (args.Length is < 1 or > 2)
{
    Console.Error.WriteLine("usage: GenAIChat PACKAGE [PROVIDER]");
    return 2;
}

using var config = new Config(args[0]);
if (args.Length == 2)
{
    config.ClearProviders();
    if (args[1] != "cpu") config.AppendProvider(args[1]);
}
using var model = new Model(config);
using var tokenizer = new Tokenizer(model);
using var settings = new GeneratorParams(model);
settings.SetSearchOption("max_length", 4096);  // of the whole conversation; reserved from the start
settings.SetSearchOption("temperature", 0.6);
settings.SetSearchOption("top_p", 0.95);
using var generator = new Generator(model, settings);  // holds the states from turn to turn

var answered = false;
while (Ask() is { Length: > 0 } question)
{
    var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = question } });
    var turn = tokenizer.ApplyChatTemplate("", messages, "", true);  // "": the package's template

    // The end token of an answer is chosen, and never fed: the next turn begins with it.
    using var tokens = tokenizer.Encode(answered ? "<|end|>" + turn : turn);
    generator.AppendTokenSequences(tokens);

    using var stream = tokenizer.CreateStream();  // never gives half a character
    while (!generator.IsDone())
    {
        generator.GenerateNextToken();
        Console.Write(stream.Decode(generator.GetSequence(0)[^1]));
    }
    Console.WriteLine();
    answered = true;
}
return 0;

static string? Ask()
{
    Console.Write("> ");
    return Console.ReadLine()?.Trim();
}
