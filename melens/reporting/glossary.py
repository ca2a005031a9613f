"""Words that the page uses and a reader may not know."""

GLOSSARY = {
    "Activation": "A number inside the model while it reads a text. Here mostly an entry of the "
    "residual stream.",
    "BOS": "The token that some models put before every text (beginning of sequence).",
    "Block": "One layer of the model: attention, then a feed-forward network (FFN). Layer 0 is "
    "the first; “at layer 3” means at the output of block 3.",
    "Control": "The same kind of edit where it should do nothing special, to tell an effect from "
    "the effect of any edit.",
    "Dimension": "One coordinate of the residual stream, counted from 0.",
    "Effective rank": "How many directions a set of vectors fills: the exponential of the entropy "
    "of the singular values. 1 means all lie on one line.",
    "Gain": "The factor by which a norm layer multiplies each dimension.",
    "Interval": "A 95 % confidence interval by bootstrap: the texts are drawn again 2,000 times, "
    "with repetition, and 95 % of the results lie in it; wider where the best of several "
    "conditions was picked. It is about texts of this kind only, and few texts make it too "
    "narrow. “none” where they are too few or all alike.",
    "Key/value cache": "What a running model keeps of earlier tokens. Dropping or rounding "
    "entries saves memory.",
    "Massive activation": "An entry of the residual stream that is larger than 100 and than a "
    "thousand times the median, on a few tokens only.",
    "Massive token": "A token that carries a massive activation, most often the first of a text.",
    "ME Layer": "The layer at whose output the massive activation first appears (massive "
    "emergence).",
    "Nats": "The unit of the loss, natural logarithm. A loss of 3 nats a token is a perplexity of "
    "about 20; +0.1 nats is 10 % more perplexity.",
    "Norm ratio": "Length of the heaviest token's vector over that of a typical token.",
    "Residual stream": "The vector that each token carries through the layers; every block adds "
    "to it.",
    "Sink": "A token that draws a large share of a head's attention without saying anything. The "
    "sink rate at eps 0.3 is the share of heads that give it more than 0.3.",
    "Super weight": "One entry of an FFN's last matrix that makes at least half of a very large "
    "output of that FFN on its own. What the model loses without it is measured, not assumed.",
    "Write share": "The part of the massive token's vector that one layer adds; negative where it "
    "takes away.",
}
