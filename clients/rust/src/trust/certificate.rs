//! The two parts of an X.509 certificate that rustls does not expose: its validity period, and its public key.

/// Parts of a certificate in DER. Nothing of it is trusted until its signature is verified or a pin matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Certificate<'a> {
    /// SubjectPublicKeyInfo, with tag and length.
    pub(crate) spki: &'a [u8],
    /// The validity period in seconds since the Unix epoch; both ends are inside.
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
}

const SEQUENCE: u8 = 0x30;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const EXPLICIT_VERSION: u8 = 0xa0;

impl<'a> Certificate<'a> {
    /// Parse a certificate (RFC 5280 section 4.1). Return `None` if it is malformed.
    pub(crate) fn parse(der: &'a [u8]) -> Option<Self> {
        let (certificate, _) = value(der, SEQUENCE)?;
        let (mut rest, _) = value(certificate, SEQUENCE)?;
        if rest.first() == Some(&EXPLICIT_VERSION) {
            rest = element(rest)?.1;
        }
        for _ in ["serialNumber", "signature", "issuer"] {
            rest = element(rest)?.1;
        }
        let (validity, rest) = value(rest, SEQUENCE)?;
        let (not_before, following) = time(validity)?;
        let (not_after, _) = time(following)?;
        let (_subject, rest) = element(rest)?;
        let (spki, _) = element(rest)?;
        Some(Self { spki, not_before, not_after })
    }
}

/// Return the first element with its tag and length, and what follows it.
fn element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (header, size) = match *der.get(1)? {
        short @ 0..=0x7f => (2, usize::from(short)),
        long @ 0x81..=0x83 => {
            let count = usize::from(long & 0x7f);
            let bytes = der.get(2..2 + count)?;
            (2 + count, bytes.iter().fold(0, |size, &byte| (size << 8) | usize::from(byte)))
        }
        _ => return None,
    };
    (der.len() >= header + size).then(|| der.split_at(header + size))
}

/// Return the content of the first element, which must have a tag, and what follows it.
fn value(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (whole, rest) = element(der)?;
    let header = 2 + if whole[1] < 0x80 { 0 } else { usize::from(whole[1] & 0x7f) };
    (whole[0] == tag).then(|| (&whole[header..], rest))
}

/// Return the time of the first element in seconds since the Unix epoch, and what follows it.
fn time(der: &[u8]) -> Option<(i64, &[u8])> {
    let tag = *der.first()?;
    let (text, rest) = value(der, tag)?;
    let (year, text) = match tag {
        UTC_TIME => {
            let year = digits(text.get(..2)?)?;
            (if year < 50 { 2000 + year } else { 1900 + year }, &text[2..])
        }
        GENERALIZED_TIME => (digits(text.get(..4)?)?, &text[4..]),
        _ => return None,
    };
    if text.len() != 11 || text[10] != b'Z' {
        return None;
    }
    let part = |index: usize| digits(&text[2 * index..2 * index + 2]);
    let (month, day) = (part(0)?, part(1)?);
    let (hour, minute, second) = (part(2)?, part(3)?, part(4)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some((days_since_epoch(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second, rest))
}

fn digits(text: &[u8]) -> Option<i64> {
    text.iter().try_fold(0, |number, byte| byte.is_ascii_digit().then(|| number * 10 + i64::from(byte - b'0')))
}

/// Return the days from 1970-01-01 to a date of the Gregorian calendar.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the day of a leap year is the last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_counted_from_the_epoch() {
        assert_eq!(days_since_epoch(1970, 1, 1), 0);
        assert_eq!(days_since_epoch(2000, 2, 29), 11_016);
        assert_eq!(days_since_epoch(2000, 3, 1), 11_017);
        assert_eq!(days_since_epoch(2026, 1, 1), 20_454);
        assert_eq!(days_since_epoch(1969, 12, 31), -1);
    }

    #[test]
    fn times_have_two_forms() {
        let utc = [[UTC_TIME, 13].as_slice(), b"260101000000Z"].concat();
        assert_eq!(time(&utc), Some((1_767_225_600, &[][..])));
        let general = [[GENERALIZED_TIME, 15].as_slice(), b"20500101000001Z"].concat();
        assert_eq!(time(&general), Some((2_524_608_001, &[][..])));
        let past = [[UTC_TIME, 13].as_slice(), b"500101000000Z"].concat();
        assert!(time(&past).unwrap().0 < 0);
        for wrong in [b"2601010000000".as_slice(), b"261301000000Z", b"26010100000Z", b"26010100000-Z"] {
            assert_eq!(time(&[[UTC_TIME, u8::try_from(wrong.len()).unwrap()].as_slice(), wrong].concat()), None);
        }
    }

    #[test]
    fn no_input_panics() {
        let mut seed = 1u32;
        for size in 0..400usize {
            let data: Vec<u8> = (0..size)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let byte = (seed >> 24) as u8;
                    if byte % 3 == 0 { SEQUENCE } else { byte % 32 }
                })
                .collect();
            let _ = Certificate::parse(&data);
        }
    }
}
