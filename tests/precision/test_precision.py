"""Number formats: the policies, and the matmul by default."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.precision.matmul import PLAIN
from deepseek_jax.precision.policy import policy


def test_policies():
    assert policy("fp32").compute == jnp.float32
    assert policy("bf16").compute == jnp.bfloat16
    with pytest.raises(UserError, match="config.precision='fp17': no such precision. Choose one of fp32, bf16, fp8"):
        policy("fp17")


def test_the_activations_decide_the_dtype():
    x, w = np.ones((2, 3), np.float32), np.full((3, 4), 1 + 2**-10, np.float32)
    np.testing.assert_allclose(PLAIN.einsum("BD,DF->BF", jnp.asarray(x), w), x @ w, rtol=1e-6)
    narrow = PLAIN.einsum("BD,DF->BF", jnp.bfloat16(x), jnp.asarray(w))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(narrow), 3.0)
