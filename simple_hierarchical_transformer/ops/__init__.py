"""Operations that do not depend on the architecture: functions of tensors, and modules that wrap them."""
