// A page of a WinUI 3 application that answers with a package.
//
// Not compiled by this project: its machines have no Windows and no Windows App SDK. The calls to GenAI are
// those of ../GenAIChat, which is compiled and tested.
//
// Needs the NuGet packages Microsoft.WindowsAppSDK and Microsoft.ML.OnnxRuntimeGenAI.WinML, and the
// target framework net8.0-windows10.0.19041.0 or later. The package folder lies beside the application:
// <Content Include="package\**" CopyToOutputDirectory="PreserveNewest" />

using System;
using System.IO;
using System.Text.Json;
using System.Threading.Tasks;
using Microsoft.ML.OnnxRuntimeGenAI;
using Microsoft.UI.Xaml;
using Microsoft.UI.Xaml.Controls;
using Microsoft.Windows.AI.MachineLearning;

namespace SambayChat;

public sealed partial class ChatPage : Page
{
    private Model? model;
    private Tokenizer? tokenizer;
    private volatile bool closed;
    private Task answering = Task.CompletedTask;

    public ChatPage() => InitializeComponent();

    private async void OnLoaded(object sender, RoutedEventArgs e)
    {
        try
        {
            // Fetches and registers the execution providers of this PC's processors; the package's
            // genai_config.json says which one runs it.
            await ExecutionProviderCatalog.GetDefault().EnsureAndRegisterCertifiedAsync();
            await Task.Run(() =>
            {
                model = new Model(Path.Combine(AppContext.BaseDirectory, "package"));
                tokenizer = new Tokenizer(model);
            });
            Send.IsEnabled = true;
        }
        catch (Exception error)
        {
            Answer.Text = error.Message;
        }
    }

    private async void OnSend(object sender, RoutedEventArgs e)
    {
        var question = Question.Text;
        Send.IsEnabled = false;
        Answer.Text = "";
        try
        {
            answering = Task.Run(() => Generate(question));
            await answering;
        }
        catch (Exception error)
        {
            Answer.Text = error.Message;
        }
        Send.IsEnabled = true;
    }

    // Off the window's thread: a step of the model takes tens of milliseconds.
    private void Generate(string question)
    {
        using var settings = new GeneratorParams(model!);
        settings.SetSearchOption("max_length", 4096);
        using var generator = new Generator(model!, settings);
        var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = question } });
        using var prompt = tokenizer!.Encode(tokenizer.ApplyChatTemplate("", messages, "", true));
        generator.AppendTokenSequences(prompt);
        using var stream = tokenizer.CreateStream();
        while (!closed && !generator.IsDone())
        {
            generator.GenerateNextToken();
            var piece = stream.Decode(generator.GetNextTokens()[0]);
            DispatcherQueue.TryEnqueue(() => Answer.Text += piece);
        }
    }

    private async void OnUnloaded(object sender, RoutedEventArgs e)
    {
        closed = true;
        await Task.WhenAny(answering);  // an error of it has been shown
        tokenizer?.Dispose();
        model?.Dispose();
    }
}
