//! Logarithm and exponential of few instructions, the same on every processor and system.

use std::f32::consts::{LN_2, LOG2_E};

/// Adding it leaves the nearest integer, plus the bias of exponents, in the lowest bits of the sum.
const TO_EXPONENT: f32 = 12_582_912.0 + 127.0;
/// 2^f for f from -0.5 to 0.5, highest power first; relative error below 2e-7.
#[allow(clippy::approx_constant)]
const POWERS: [f32; 6] = [0.001_326_472_5, 0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0];
/// Of no number further from 0 there is an exponential.
const FURTHEST: f32 = 80.0;

/// The exponential, relative error below 1e-5. That of numbers beyond -80 and 80 is theirs.
#[inline(always)]
pub fn exp(value: f32) -> f32 {
    // in this order a number that is none becomes one
    #[allow(clippy::manual_clamp)]
    let power = value.max(-FURTHEST).min(FURTHEST) * LOG2_E;
    let whole = power + TO_EXPONENT;
    let rest = power - (whole - TO_EXPONENT);
    let fraction = POWERS.iter().fold(0.0, |sum, power| sum * rest + power);
    f32::from_bits(whole.to_bits() << 23) * fraction
}

/// The natural logarithm of a positive number, off by at most 0.008.
#[inline(always)]
pub fn ln(value: f32) -> f32 {
    let bits = value.to_bits();
    let exponent = (bits >> 23) as i32 as f32 - 127.0;
    let mantissa = f32::from_bits(bits & 0x7f_ffff | 0x3f80_0000) - 1.0;
    (exponent + mantissa * (1.3465 - 0.3465 * mantissa)) * LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_exact_enough() {
        for step in -8000..8000 {
            let value = step as f32 * 0.01;
            let exact = f64::from(value).exp();
            assert!((f64::from(exp(value)) / exact - 1.0).abs() < 1e-5, "{value}");
            assert!((ln(exact as f32) - value).abs() < 0.008, "{value}");
        }
        assert!(exp(-1e9) < 1e-30 && exp(1e9).is_finite() && exp(f32::NAN).is_finite() && exp(0.0) == 1.0);
    }
}
