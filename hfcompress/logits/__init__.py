"""Row by row over logits of any number of classes: a softmax, a divergence, sums of such terms."""
