// A chat on the console through ONNX Runtime GenAI:  dotnet run -- PACKAGE [PROVIDER]
//
// Compiled and tested on Linux, with .NET 8 and the sources of Microsoft.ML.OnnxRuntimeGenAI as npm has
// them (version 0.4.9); not run on Windows, nor with the NuGet package that the project names.
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
        // Not the last of the sequence: that stays the token before, when the end token comes.
        Console.Write(stream.Decode(generator.GetNextTokens()[0]));
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
