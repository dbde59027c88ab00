// exp, softplus and silu of a vector, to 2e-7 relative.

namespace sambay::SAMBAY_ISA {

// exp(x), 0 below -87.7 and infinity from 88.4 on (a float goes to 88.7); NaN stays.
// exp(x) = 2^n exp(r), n = round(x / ln 2): ln 2 in two parts keeps r exact. The polynomial is a
// minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= 0.3475, relative error 3e-9.
inline Vec exp(Vec x) {
  const Vec bias = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = max(set(-88.0f), min(set(89.0f), x));
  const Vec biased = fma(x, set(1.44269504f), bias);
  const Vec n = biased - bias;
  Vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  Vec p = fma(r, set(0.001381422160f), set(0.008368899114f));
  p = fma(p, r, set(0.04166840389f));
  p = fma(p, r, set(0.1666651964f));
  p = fma(p, r, set(0.4999999404f));
  return fma(p, r * r, r + set(1.0f)) * power_of_two(biased);
}

// log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|).
// log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3: relative accuracy for small u too. The polynomial is
// a minimax fit of 2 atanh(s) / s in s^2, relative error 1e-10.
inline Vec softplus(Vec x) {
  const Vec u = exp(min(set(0.0f) - x, x));
  const Vec s = u / (u + set(2.0f));
  const Vec z = s * s;
  Vec p = fma(z, set(0.2428956479f), set(0.2143074040f));
  p = fma(p, z, set(0.2861659825f));
  p = fma(p, z, set(0.3999888897f));
  p = fma(p, z, set(0.6666667461f));
  p = fma(p, z, set(2.0f));
  return fma(p, s, max(set(0.0f), x));
}

inline Vec silu(Vec x) { return x / (set(1.0f) + exp(set(0.0f) - x)); }

}  // namespace sambay::SAMBAY_ISA
