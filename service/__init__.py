"""The completion service.

The journey of a request, with the real names:

    HTTP -> Envoy -> rpc.interceptors.CallInterceptor    authenticates, reads the message, turns errors into statuses
         -> rpc.servicer.CompletionServicer              one method per RPC
         -> rpc.parse.parse                              wire message -> types.Request, valid by construction
         -> engine.engine.Engine.submit                  -> Generation, which receives the pieces
    step thread, until the request ends:
         engine.scheduler.Scheduler.schedule             which sequence advances by how many tokens
         engine.ort.model.Model.forward                  tokens -> logits
         engine.sampler.choose                           logits -> the next token
         engine.commit.Committer.advance                 token -> text.transcript.Transcript -> types.Delta
         -> rpc.render                                   pieces -> messages, or events for HTTP
    interceptor and engine report to telemetry.observer.Observer: metrics count the events, tracing makes spans of them
"""

import os

# onnxruntime reads this when it is first imported; it turns off its telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
