"""Small bi-modal and detection models, the scripts that train them, and their loaders.

VisualBERT and LXMERT answer easy-VQA questions; a DETR finds handwritten digits; a CLIP compares drawings with
captions. All are unmodified Hugging Face classes made from small configurations.
"""
