"""The exporter: the weights of a GGUF file or a Hugging Face directory become a model directory for the service.

The journey of a weight, with the real names:

    path -> opening.read_source                          opens the source and chooses the builder of its graph
         -> sources.gguf.read.open_gguf                  reads each file's header, once
            or sources.hugging_face.directory.read_directory   reads config.json and the shards' headers, once
         -> sources.families.FAMILIES                    the row that describes what its family computes
         -> sources.checkpoint.Checkpoint                exactly the tensors of that architecture, still on disk
    for each layer:
         sources.checkpoint.Checkpoint.tensor            some rows at a time: disk -> float32, or the file's blocks
         native.graph                                    stacks matrices that are multiplied by the same input
         graph.operators.Operators.linear                the product, in the requested form
         graph.quantize.pack                             -> codes, scales, zero points
         graph.initializers.Initializers.add             -> the file of weights, at the start of a page
    verify.verify.verify                                 runs the written graphs and compares with native.reference
    export.export                                        writes the manifest
    destination.written_at_once                          all appears at once or not at all

For families that mobius builds, opening returns a mobius.source.MobiusSource; the rest of the journey is the same.
"""

import os

# Before onnxruntime is first imported: later is too late to keep it from sending telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
