use std::collections::HashMap;
use zcproto::{Client, ConnectOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or("localhost:7443".into());
    let home = std::env::var("ZCPROTO_HOME").or(std::env::var("HOME").map(|home| home + "/.zeroclaw"))?;
    let key = std::fs::read_to_string("ada.key")?;
    let options = ConnectOptions::new(address).api_key("ada", key.trim()).ca_file(home + "/certs/ca.crt");
    let client = Client::connect(options).await?;
    let stream = client.stream("words", &HashMap::from([("text", "to be or not")])).open();
    while let Some(word) = stream.next::<String>().await? {
        println!("{word}");
    }
    println!("{:?}", stream.result::<HashMap<String, u32>>().await?); // {"words": 4}
    client.close().await;
    Ok(())
}
