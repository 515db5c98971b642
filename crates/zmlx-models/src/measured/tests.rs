use super::*;

fn record(model: &str) -> Measured {
    Measured {
        model: model.to_owned(),
        device: "NVIDIA H100 80GB HBM3".to_owned(),
        date: "2026-11-23".to_owned(),
        commit: "348dd60".to_owned(),
        form: Form { context: 64, tokens: 128, beside_stock: true },
        bytes_per_token: 1_000_000_000,
        launches_per_token: 126,
        stock: vec![181.0, 185.5, 152.0],
        ours: vec![1340.0, 670.0, 1000.0],
        compared: None,
        prefill: Vec::new(),
    }
}

fn compared() -> Compared {
    let distance = Distance { error: 0.25, kl: 0.5, other_tokens: Some(3) };
    let ours = Some(Divergence { step: 4, expected: 1, found: 2, margin: 0.125, distance: 0.25 });
    let divergences = Divergences { ours, ..Divergences::default() };
    Compared {
        steps: 32,
        stock: distance,
        ours: distance,
        kl_of_both: Some(0.75),
        divergences: Some(divergences),
    }
}

fn read(text: &str) -> Result<Vec<Measured>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines.jsonl");
    std::fs::write(&path, text).unwrap();
    let shown = format!("{}/", folder.path().display());
    Measured::read(&path).map_err(|e| e.to_string().replace(&shown, ""))
}

#[test]
fn what_is_appended_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines.jsonl");
    let mut full = record("lfm2_8b");
    full.compared = Some(compared());
    full.prefill = vec![Prefill { length: 128, stock: vec![2148.0], ours: vec![7537.0, 7894.5] }];
    let mut alone = record("glm4_7_flash");
    alone.stock = Vec::new();
    alone.form.beside_stock = false;
    let all = [full, alone];
    for one in &all {
        one.append(&path).unwrap();
    }
    assert_eq!(Measured::read(&path).unwrap(), all);
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
}

#[test]
fn a_bad_line_is_named_with_file_and_number() {
    let good = serde_json::to_string(&record("a")).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    let cases = [
        ("{".to_owned(), "EOF while parsing an object at column 1"),
        (changed("\"model\"", "\"modell\""), "unknown field `modell`"),
        (changed("\"commit\":\"348dd60\",", ""), "missing field `commit`"),
        (changed("2026-11-23", "23.11.2026"), "date is \"23.11.2026\" and not as 2026-11-23"),
        (changed("\"a\"", "\" \""), "model is \" \""),
        (changed("1000000000", "0"), "bytes_per_token is 0"),
        (changed("185.5", "-1.0"), "a rate is -1 tok/s"),
        (changed("[1340.0,670.0,1000.0]", "[]"), "ours is empty"),
        (
            changed("HBM3", "HBM9"),
            "the memory bandwidth of the device \"NVIDIA H100 80GB HBM9\" is not known",
        ),
    ];
    for (line, message) in cases {
        // The third line of the file: an empty one is passed over, and counts.
        let found = read(&format!("{good}\n\n{line}\n")).unwrap_err();
        assert!(found.starts_with(&format!("lines.jsonl:3: {message}")), "{found}");
        assert!(found.ends_with("; mend or remove this line"), "{found}");
    }
    assert_eq!(read(&format!("{good}\n\n{good}\n")).unwrap().len(), 2);
    let missing = Measured::read(Path::new("/nowhere/h100.jsonl")).unwrap_err().to_string();
    assert!(missing.contains("/nowhere/h100.jsonl"), "{missing}");
}

#[test]
fn what_is_no_number_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines.jsonl");
    let mut wrong = record("lfm2_8b");
    wrong.compared = Some(Compared { kl_of_both: Some(f64::NAN), ..compared() });
    let refused = wrong.append(&path).unwrap_err().to_string();
    assert_eq!(refused, "the run of lfm2_8b is not kept: a figure beside float32 is NaN");
    let mut parted = compared();
    parted.divergences.as_mut().unwrap().ours.as_mut().unwrap().distance = f64::INFINITY;
    wrong.compared = Some(parted);
    assert!(wrong.append(&path).is_err());
    wrong.compared = None;
    wrong.ours[1] = f64::INFINITY;
    assert!(wrong.append(&path).is_err());
    assert!(!path.exists());
}

const DOCUMENT: &str = "before\n<!-- measured decode -->\nold\n<!-- end of measured decode -->\nmiddle\n\
                        <!-- measured prompts -->\n<!-- end of measured prompts -->\nafter\n";

#[test]
fn the_last_line_of_a_model_and_form_is_the_row() {
    let old = record("a");
    let other = record("b");
    let mut new = record("a");
    new.commit = "fff0000".to_owned();
    new.stock = Vec::new();
    let mut long = record("a");
    long.form = Form { context: 8200, tokens: 64, beside_stock: false };
    let mut prompted = record("a");
    prompted.prefill = vec![
        Prefill { length: 512, stock: vec![1300.0, 1200.0, 1250.0], ours: vec![12_345.6] },
        Prefill { length: 2048, stock: vec![], ours: vec![1.0] },
    ];
    let text = with_tables(DOCUMENT, &[old, prompted, other, long, new]).unwrap();
    // A gigabyte a token is 3,350 tokens a second; the median of ours is 1,000.
    let expected = "before
<!-- measured decode -->
| model | bound tok/s | stock MLX tok/s | ours tok/s | share of the bound | launches a token | date | commit | device |
|---|---|---|---|---|---|---|---|---|
| `a` | 3,350 | - | 1,340, 670, 1,000 | 30 % | 126 | 2026-11-23 | fff0000 | NVIDIA H100 80GB HBM3 |
| `a`, after 8,200, 64 tokens, past MLX alone | 3,350 | 181, 186, 152 | 1,340, 670, 1,000 | 30 % | 126 | 2026-11-23 | 348dd60 | NVIDIA H100 80GB HBM3 |
| `b` | 3,350 | 181, 186, 152 | 1,340, 670, 1,000 | 30 % | 126 | 2026-11-23 | 348dd60 | NVIDIA H100 80GB HBM3 |
<!-- end of measured decode -->
middle
<!-- measured prompts -->
| model | prompt in one call | stock MLX tok/s | ours tok/s | date | commit | device |
|---|---|---|---|---|---|---|
| `a` | 512 | 1,200 to 1,300 | 12,346 | 2026-11-23 | 348dd60 | NVIDIA H100 80GB HBM3 |
| `a` | 2,048 | - | 1 | 2026-11-23 | 348dd60 | NVIDIA H100 80GB HBM3 |
<!-- end of measured prompts -->
after
";
    assert_eq!(text, expected);
    // Made of itself, it is the same.
    assert_eq!(with_tables(&text, &[record("a")]).unwrap(), with_tables(DOCUMENT, &[record("a")]).unwrap());
}

#[test]
fn a_document_without_a_place_for_a_table_is_an_error() {
    let missing = ["<!-- measured decode -->", "<!-- end of measured prompts -->"];
    for marker in missing {
        let found = with_tables(&DOCUMENT.replace(marker, ""), &[record("a")]).unwrap_err().to_string();
        assert!(found.contains(marker), "{found}");
    }
}

#[test]
fn a_line_says_when_it_was_made() {
    let mut now = record("a");
    now.date = today();
    now.commit = commit();
    assert_eq!(now.check(), Ok(()));
    assert!(now.date.as_str() > "2026-01-01", "{}", now.date);
}
