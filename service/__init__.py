"""The completion service.

The journey of a request, with the real names:

    HTTP -> Envoy -> rpc.interceptors.CallInterceptor    authenticates, then reads, and turns errors into statuses
         -> rpc.servicer.CompletionServicer              one method per RPC
         -> rpc.parse.parse                              wire message -> types.Request, valid by construction
         -> engine.engine.Engine.submit                  -> Generation, where the pieces will arrive
    step thread, until the request ends:
         engine.scheduler.Scheduler.schedule             which sequence advances by how many tokens
         engine.ort.model.Model.forward                  tokens -> logits
         engine.sampler.choose                           logits -> the next token
         engine.commit.Committer.advance                 token -> text.transcript.Transcript -> types.Delta
         -> rpc.render                                   pieces -> messages, or events for HTTP
    interceptor and engine tell telemetry.observer.Observer what happens: metrics counts it, tracing makes spans of it
"""

import os

# Before onnxruntime is first imported: later is too late to keep it from sending telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
