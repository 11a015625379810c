// The CPU kernels of the compiled extension. Shapes, dtypes and layout were checked by the caller.
#pragma once

#include "step.h"

namespace cmai_fast {

void pgd_linf_step(const PgdStep& args, int threads);
void pgd_l2_step(const PgdStep& args, int threads);
void apgd_linf_step(const ApgdStep& args, int threads);
void apgd_l2_step(const ApgdStep& args, int threads);
void random_start_linf(const RandomStart& args, int threads);
void random_start_l2(const RandomStart& args, int threads);

void gated_activation(const GatedActivation& args, void* out, int threads);
// grad_other is not written without other.
void gated_activation_backward(const GatedActivation& args, const void* grad, void* grad_x, void* grad_other,
                               int threads);

}  // namespace cmai_fast
