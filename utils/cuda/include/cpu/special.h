// Functions of mathematics that C does not have, or has for doubles only. Included where a source uses them.
#pragma once

#if defined(_WIN32)
#define CU_BESSEL(name, ...) extern "C" double _##name(__VA_ARGS__) noexcept;
CU_BESSEL(j0, double) CU_BESSEL(j1, double) CU_BESSEL(jn, int, double)
CU_BESSEL(y0, double) CU_BESSEL(y1, double) CU_BESSEL(yn, int, double)
CU_INLINE double j0(double x) { return _j0(x); }
CU_INLINE double j1(double x) { return _j1(x); }
CU_INLINE double y0(double x) { return _y0(x); }
CU_INLINE double y1(double x) { return _y1(x); }
CU_INLINE double jn(int n, double x) { return _jn(n, x); }
CU_INLINE double yn(int n, double x) { return _yn(n, x); }
#else
extern "C" {
double j0(double) noexcept;
double j1(double) noexcept;
double jn(int, double) noexcept;
double y0(double) noexcept;
double y1(double) noexcept;
double yn(int, double) noexcept;
}
#endif

// The sum of (x/2)^(2k + order) / (k! (k + order)!): all terms are positive, so none is lost against another.
CU_UNCHECKED inline double cu_modified_bessel(double x, int order) {
  double quarter = x * x / 4, term = order ? x / 2 : 1, sum = term;
  for (int k = 1; k < 2000 && fabs(term) > 1e-17 * fabs(sum); ++k) {
    term *= quarter / ((double)k * (k + order));
    sum += term;
  }
  return sum;
}
CU_INLINE double cyl_bessel_i0(double x) { return cu_modified_bessel(x, 0); }
CU_INLINE double cyl_bessel_i1(double x) { return cu_modified_bessel(x, 1); }

// exp(x^2) erfc(x); where erfc is too small for a double, by its continued fraction.
CU_UNCHECKED inline double erfcx(double x) {
  if (x < 10) return exp(x * x) * erfc(x);
  double fraction = x;
  for (int k = 40; k; --k) fraction = x + k / 2.0 / fraction;
  return 0.56418958354775628695 / fraction;
}

// The inverse of erfc for 0 < x < 2: a rational guess (1e-3), then Halley's steps, each of which triples its digits.
CU_UNCHECKED inline double erfcinv(double x) {
  if (!(x > 0 && x < 2)) return x == 0 ? HUGE_VAL : x == 2 ? -HUGE_VAL : (double)NAN;
  double small = x < 1 ? x : 2 - x, t = sqrt(-2 * log(small / 2));
  double y = -0.70711 * ((2.30753 + t * 0.27061) / (1 + t * (0.99229 + t * 0.04481)) - t);
  for (int i = 0; i < 3; ++i) {
    double miss = erfc(y) - small, slope = 1.12837916709551257390 * exp(-y * y);
    if (slope > 0) y += miss / (slope - y * miss);
  }
  return x < 1 ? y : -y;
}
CU_UNCHECKED inline double erfinv(double x) {
  if (!(fabs(x) < 0.5)) return x < 0 ? -erfcinv(1 + x) : erfcinv(1 - x);
  double y = x * 0.88622692545275801365 * (1 + x * x * 0.2618);
  for (int i = 0; i < 4; ++i) {
    double miss = erf(y) - x, slope = 1.12837916709551257390 * exp(-y * y);
    y -= miss / (slope + y * miss);
  }
  return y;
}
CU_INLINE double normcdfinv(double p) { return -1.41421356237309504880 * erfcinv(2 * p); }

#define CU_AS_FLOAT(name) CU_INLINE float name##f(float x) { return (float)name((double)x); }
CU_AS_FLOAT(j0) CU_AS_FLOAT(j1) CU_AS_FLOAT(y0) CU_AS_FLOAT(y1)
CU_INLINE float jnf(int n, float x) { return (float)jn(n, (double)x); }
CU_INLINE float ynf(int n, float x) { return (float)yn(n, (double)x); }
CU_AS_FLOAT(cyl_bessel_i0) CU_AS_FLOAT(cyl_bessel_i1)
CU_AS_FLOAT(erfcx) CU_AS_FLOAT(erfcinv) CU_AS_FLOAT(erfinv) CU_AS_FLOAT(normcdfinv)
#define CU_OF_FLOAT(name) CU_INLINE float name(float x) { return name##f(x); }
CU_OF_FLOAT(cyl_bessel_i0) CU_OF_FLOAT(cyl_bessel_i1)
CU_OF_FLOAT(erfcx) CU_OF_FLOAT(erfcinv) CU_OF_FLOAT(erfinv) CU_OF_FLOAT(normcdfinv)
