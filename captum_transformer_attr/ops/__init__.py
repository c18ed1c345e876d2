"""The operations of a recorded forward, one file per family. Importing this package registers them all."""

# isort: off
from captum_transformer_attr.ops import linear as linear
from captum_transformer_attr.ops import convolution as convolution
from captum_transformer_attr.ops import pooling as pooling
from captum_transformer_attr.ops import grouped as grouped
from captum_transformer_attr.ops import softmax as softmax
from captum_transformer_attr.ops import attention as attention
from captum_transformer_attr.ops import bilinear as bilinear
from captum_transformer_attr.ops import constant_attention as constant_attention
from captum_transformer_attr.ops import elementwise as elementwise
from captum_transformer_attr.ops import residual as residual
from captum_transformer_attr.ops import product as product
from captum_transformer_attr.ops import reduction as reduction
from captum_transformer_attr.ops import scatter as scatter
from captum_transformer_attr.ops import norm as norm
from captum_transformer_attr.ops import composed as composed
from captum_transformer_attr.ops import embedding as embedding
from captum_transformer_attr.ops import shape as shape
