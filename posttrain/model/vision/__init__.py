"""Images in Llama 4, with the names and weights of transformers' `Llama4ForConditionalGeneration`.

    tiles of all pictures ─► encoder ─► adapter ─► projector ─► embeddings in the places of <|patch|> ─► text model
       [N, 3, H, W]         (vision_model)       (multi_modal_projector)          (fusion)

encoder.py   tiles to features: patches, attention within a tile, the pixel-shuffle adapter
fusion.py    the whole model: the projector, and where features stand among the embeddings
sizes.py     sizes of tiles, patches and features, checked against each other
parts.py     the three parts of the model by name, and which of them are trained

A picture is cut into tiles before this (transformers' `Llama4ImageProcessor`). Left out: tensor parallelism.
"""
