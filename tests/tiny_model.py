"""What makes a model of configs/shapes small enough for a unit test."""

# Group normalisation needs 32 channels and more, hence the other norms.
TINY_MODEL = (
    ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
    + ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", ""]
    + ["MODEL.ROI_MASK_HEAD.NORM", "", "MODEL.TEACHER_MASK_HEAD.NORM", ""]
    + ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.TEACHER_MASK_HEAD.CONV_DIM", 8]
)
