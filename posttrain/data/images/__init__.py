"""Pictures of rows: found in the forms that people write, checked once, kept encoded, and counted in tokens.

    row ─► take.py ─► decode.py ─► store.py            the row keeps a short key for each picture
                                     │
    messages ─► render.py ─► tokens ◄┴─ tiles.py       a picture's tokens follow from its size alone

take.py      where the pictures of a row are: content parts, a column of pictures, <image> in the text
decode.py    checks a picture, and makes RGB of it
store.py     the file of encoded pictures, each kept once, read through a memory map
tiles.py     the tiles and tokens of a picture, by the rules of Llama 4's processor
render.py    token ids of messages with pictures
preview.py   a row in tokens, with a description in the place of each picture
modality.py  text, one picture or several
section.py   the readers that the section `images` of a stage asks for
references.py    reads a picture by a reference to it, in a reward, an engine or a request to a judge
files.py     writes pictures as files, for rows that a stage writes

Nothing is ever downloaded. Left out: videos and sounds.
"""
